"""Mistakes in modules outside the package are errors that name the module, what was found and what is expected."""

from itertools import count
from typing import Any

import pytest

import ficpd
from ficpd.errors import BackboneError, ConfigError, DataError, FicpdError, PrivacyError, RunError

METHOD = """
from ficpd.federation.method import Capabilities, Method
from ficpd.optimizers import tune
from ficpd.registry import FrozenConfig
from ficpd.types import ClientUpdate, State

class Config(FrozenConfig):
    pass

def build(config, training):
    return Own(training)

class Own(Method):
    name, capabilities = "own", Capabilities(private_units=("record",))

    def local_update(self, client, assignment):
        prompt = assignment.arrays["prompt"]
        tuned = yield from tune(self.training, client, assignment, prompt)
        return ClientUpdate(client.id, {"delta": tuned - prompt}, client.weight)

    def aggregate(self, state, updates, round, model):
        mean = sum(update.arrays["delta"] for update in updates) / len(updates)
        return State({"prompt": state.arrays["prompt"] + mean}, state.facts)
"""
TASK = """
from torch.nn import functional as F
from ficpd.tasks import classification

class Config(classification.Config):
    gamma: float = 1.0

def build(config):
    return Own(config)

class Own(classification.Classification):
    def loss(self, outputs, batch):
        loss = F.cross_entropy(self.logits(outputs, batch), batch.targets, reduction="none")
        return self.config.gamma * loss

    def to_config(self):
        return {**super().to_config(), "name": "TASK"}
"""
METRIC = """
import torch
from ficpd.registry import FrozenConfig

class Config(FrozenConfig):
    pass

def build(config):
    return lambda predictions, targets: {"kappa": 0.5}
"""
PARTITION = """
from ficpd.registry import FrozenConfig
from ficpd.types import ClientData

class Config(FrozenConfig):
    pass

def build(config):
    def divide(data, seed):
        return {f"part-{i}": ClientData(data.train[i::2], data.test[i::2], {}) for i in range(2)}
    return divide
"""
SOURCE = """
from ficpd.registry import FrozenConfig

class Config(FrozenConfig):
    rows: int = 40

def build(config):
    for place in range(config.rows):
        good = place % 2
        yield {"text": f"{'lovely' if good else 'dull'} film {place}", "target": "good" if good else "bad"}
"""
BACKBONE = """
import zlib
import torch
from torch.nn import functional as F
from ficpd.interfaces import Backbone
from ficpd.registry import FrozenConfig
from ficpd.types import EncodedInput, HiddenStates, ModelOutput

class Config(FrozenConfig):
    width: int = 16

def build(config, weights, *, dtype, attention, device, name):
    return Words(config.width, device, name)

class Words(Backbone):
    depth, max_tokens, supports_gradients = 1, 64, True

    def __init__(self, width, device, name):
        self.width, self.device, self.name, self.fingerprint = width, device, name, f"words:{width}"
        self.table = torch.randn(4096, width, generator=torch.Generator().manual_seed(0)).to(device)

    def tokenize(self, text, pair, instruction, answer, room, writes=0):
        ids = [zlib.crc32(word.encode()) % 4096 for word in text.lower().split()[: self.max_tokens - room]] or [0]
        return EncodedInput(torch.tensor(ids), len(ids))

    def encode_prefix(self, items, layer):
        return [self.table[item.content.to(self.device)] for item in items]

    def forward(self, prompts_SPD, hidden, items, layer):
        sums_SD = torch.stack([states.sum(0) for states in hidden]) + prompts_SPD.sum(1)
        return ModelOutput(F.normalize(sums_SD, dim=-1))

    def readout(self, instruction, answers):
        items = [self.tokenize(answer, None, "", None, 0) for answer in answers]
        return 10 * F.normalize(torch.stack([states.sum(0) for states in self.encode_prefix(items, 0)]), dim=-1)

    def head_to_readout(self, rows_RCD):
        return 10 * F.normalize(rows_RCD, dim=-1)

    def init_prompt(self, text, num_tokens, enters_at, seed):
        item = self.tokenize(text or "word", None, "", None, 0)
        return self.encode_prefix([item], 0)[0].cpu()[torch.arange(num_tokens) % item.length].clone()

    def synthetic_inputs(self, number, seed):
        return [f"w{seed % 997} w{place} w{place * 7}" for place in range(number)]
"""
SOURCES = {"method": METHOD, "task": TASK, "metric": METRIC, "partition": PARTITION, "source": SOURCE,
           "backbone": BACKBONE}  # fmt: skip
RECIPE = """
name = "own"
baselines = []
method = { name = "METHOD" }
metrics = [{ name = "METRIC" }]
backbone = { name = "BACKBONE", kind = "BACKBONE" }
task = { name = "TASK", labels = { good = "good fine", bad = "bad dull" } }
data = { source = "SOURCE" }
partition = { kind = "PARTITION" }
federation = { num_rounds = 1 }
"""
UPDATE = 'return ClientUpdate(client.id, {"delta": tuned - prompt}, client.weight)'
LOSS, FEATURES = "return self.config.gamma * loss", "return ModelOutput(F.normalize(sums_SD, dim=-1))"
SHARDS, SHARD = "for i in range(2)}", "ClientData(data.train[i::2], data.test[i::2], {})"
RATING = 'lambda predictions, targets: {"kappa": 0.5}'
SCORE = """

    def score(self, predictions, targets):
        return {"accuracy": %s}"""
PREDICT = """

    def predict(self, answer, batch):
        return %s"""
TARGETS = """

    def targets(self, records):
        return None"""
ENCODE = """

    def encode(self, records, backbone, prompt):
        return None"""
MEAN = "mean = sum"
TABLE = "generator=torch.Generator().manual_seed(0)).to(device)"
STORED, KAPPA = 'return {**super().to_config(), "name": "TASK"}', '{"kappa": 0.5}'
PRIVATE = "privacy.epsilon=2"
NUMBERS = count()
"""Numbers of the packages that tests write, as the interpreter keeps modules by their names."""


@pytest.fixture
def attempt(tmp_path):
    """Runs the recipe with a changed module."""

    def run(part: str = "", old: str = "", new: str = "", *changes: str) -> Any:
        package = f"mistaken{next(NUMBERS)}"
        (tmp_path / package).mkdir()
        recipe = RECIPE
        for name, text in SOURCES.items():
            assert name != part or old in text
            dotted = f"{package}.{name}"
            text = text.replace(old, new) if name == part else text
            (tmp_path / package / f"{name}.py").write_text(text.replace("TASK", f"{package}.task"))
            recipe = recipe.replace(name.upper(), dotted)
        (tmp_path / "own.toml").write_text(recipe)
        return ficpd.run(tmp_path / "own.toml", tmp_path / "run", changes=list(changes))

    return run


def test_the_modules_run_without_a_mistake(attempt):
    assert attempt("", "", "", PRIVATE).to_frame()["kappa_own"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(("part", "old", "new", "error", "words"), [
    ("method", "def build(config, training)", "def build(config)", ConfigError, "expected build(config, training)"),
    ("method", "class Config(FrozenConfig)", "class Config", ConfigError, "a subclass of ficpd.registry.FrozenConfig"),
    ("metric", "def build(config)", "def build(predictions, targets)", ConfigError, "expected build(config)"),
    ("metric", KAPPA, "0.5", ConfigError, "returned 0.5; expected numbers by name"),
    ("metric", KAPPA, '{"kappa": "high"}', ConfigError, "expected numbers by name"),
    ("metric", KAPPA, '{"accuracy": 0.5}', ConfigError, "'accuracy', which exists already"),
    ("metric", KAPPA, "None", ConfigError, "returned None; expected numbers by name"),
    ("metric", KAPPA, "{}", ConfigError, "returned {}; expected numbers by name"),
    ("metric", KAPPA, '{"kappa": {"good": 0.5}}', ConfigError, "expected numbers by name"),
    ("metric", KAPPA, '{"kappa": torch.ones(2)}', ConfigError, "returned {'kappa': tensor([1., 1.])}"),
    ("metric", KAPPA, '{"f1": 80}', ConfigError, "which exists already"),
    ("metric", KAPPA, '{"rmse": -1}', ConfigError, "returned rmse = -1; expected 0 to inf"),
    ("metric", RATING, "0.5", ConfigError, "build(config) = 0.5; expected a function of (predictions, targets)"),
    ("metric", RATING, "lambda targets: {}", ConfigError, "expected build(config)(predictions, targets)"),
    ("metric", "class Config", "import missing\nclass Config", ConfigError, "No module named 'missing'"),
    ("metric", "class Config", "class = Config", ConfigError, "cannot be imported: SyntaxError: invalid syntax"),
    ("metric", "class Config", "missing\nclass Config", ConfigError, "NameError: name 'missing' is not defined ("),
    ("task", STORED, STORED + SCORE % "80", ConfigError, "returned accuracy = 80; expected 0 to 1"),
    ("task", LOSS, "return loss / 0 * 0", ConfigError, "row 1 is nan at the initial prompt; expected a finite number"),
    ("task", LOSS, "return 3.0", ConfigError, "loss returned a float; expected (8,): one number a row"),
    ("task", LOSS, "return loss.detach()", ConfigError, "loss has no gradient for the prompt"),
    ("task", LOSS, "return loss.mean()", ConfigError, "the shape (); expected ("),
    ("task", LOSS, "return loss[:, None]", ConfigError, "one number a row"),
    ("task", STORED, "return super().to_config()", ConfigError, "name = 'classification'"),
    ("source", "yield {", "yield [place] or {", DataError, "row 1 is a list; expected a mapping"),
    ("task", "return Own(config)", "return None", ConfigError, "build returned a NoneType; expected a ficpd.Task"),
    ("task", STORED, STORED + PREDICT % "None", ConfigError, "predict returned a NoneType; expected 4: one for each"),
    ("task", STORED, STORED + PREDICT % "['good']", ConfigError, "predict returned 1 entries; expected 4"),
    ("task", STORED, STORED + PREDICT % "['blue'] * 4", ConfigError, "predict returned 'blue'; expected one of"),
    ("task", STORED, STORED + TARGETS, ConfigError, "targets returned a NoneType; expected 40: one for each record"),
    ("task", STORED, STORED + ENCODE, ConfigError, "encode returned a NoneType; expected a ficpd.types.Batch"),
    ("method", "return Own(training)", "pass", ConfigError, "build returned a NoneType; expected a ficpd.fed"),
    ("method", "name, capabilities = \"own\",", "capabilities =", ConfigError, "it has no `name`; expected a text"),
    ("method", MEAN, "return None; mean = sum", RunError, "own, round 1: aggregate returned a NoneType; expected"),
    ("method", MEAN, "return State({}, state.facts); mean = sum", RunError, "no such array; expected the shape (10,"),
    ("method", MEAN, "mean = float('nan') * sum", RunError, "arrays['prompt'] with numbers that are not finite"),
    ("source", "range(config.rows)", "range(0)", DataError, "yields no rows"),
    ("source", "def build(config)", "def build(config):\n    return 5\n\ndef f(config)", DataError,
     "build returned a int; expected rows"),
    ("source", "def build(config)", "def build(config):\n    pass\n\ndef f(config)", DataError, "returned a NoneType"),
    ("source", "def build(config)", "def build(config):\n    return {'text': ['a']}\n\ndef f(config)", DataError,
     "build returned a dict; expected rows. Return a list, or yield each row"),
    ("partition", SHARDS, SHARDS + ".items()", DataError, "it returned a dict_items; expected a dict"),
    ("partition", "{f\"part-{i}\":", "{i:", DataError, "a client's name is 0; expected text"),
    ("partition", SHARD, SHARD.removeprefix("ClientData"), DataError, "client 'part-0' is a tuple"),
    ("partition", SHARD, SHARD.replace("train[", "train[1:]["), DataError, ".source row 1 was dealt 0 times"),
    ("partition", SHARD, SHARD.replace("[i::2], data", "[i::2] + data.train[i::2], data"), DataError, "dealt 2 times"),
    ("partition", SHARD, SHARD.replace("{}", "None"), DataError, "public facts None; expected texts and numbers"),
    ("partition", SHARD, SHARD.replace("{}", "{'beds': [3]}"), DataError, "{'beds': [3]}; expected texts and numbers"),
    ("partition", SHARD, SHARD.replace("data.test[i::2]", "[1]"), DataError, "a test record is a int"),
    ("partition", "divide(data, seed):", "divide(data):", ConfigError, "expected build(config)(data, seed)"),
    ("partition", "return divide", "return 3", ConfigError, "expected a function of (data, seed)"),
    ("partition", "(data, seed):", "(data, seed):\n        __import__('random').shuffle(data.train)", DataError,
     "it divides anew at each call; expected the same clients for one seed"),
    ("partition", "for i in range(2)}", "for i in range(2) if i}", DataError, "expected every train record"),
])  # fmt: skip
def test_a_mistake_is_an_error(attempt, part, old, new, error, words):
    with pytest.raises(error) as found:
        attempt(part, old, new)
    assert words in str(found.value)


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')"])
def test_a_figure_that_is_not_finite_is_left_out_with_a_warning(attempt, value):
    """A score may be undefined at a client whose records have one label."""
    of_few = f'{{"kappa": {value} if len(targets) < 8 else 0.5}}'
    with pytest.warns(UserWarning, match=r"returned kappa = (nan|inf); expected a finite number"):
        scores = attempt("metric", KAPPA, of_few).result.scores
    assert scores.global_prompt["kappa"] == 0.5
    assert "kappa" not in scores.per_client_mean


def test_a_score_without_any_finite_figure_is_an_error(attempt):
    with pytest.raises(ConfigError, match="no finite number"):
        attempt("task", STORED, STORED + SCORE % "float('nan')", "metrics=[]")


def test_texts_of_numpy_are_texts(attempt, tmp_path):
    """A source may yield what numpy computes."""
    plain = attempt().result.scores.per_client
    (tmp_path / "run").rename(tmp_path / "plain")
    text = '"target": __import__("numpy").str_("good" if good else "bad")'
    assert attempt("source", '"target": "good" if good else "bad"', text).result.scores.per_client == plain


@pytest.mark.parametrize(("part", "old", "new", "words"), [
    ("metric", KAPPA, '{"kappa": 1 / 0}', "line 9: ZeroDivisionError: division by zero"),
    ("task", LOSS, 'return loss * batch.extra["cost"]', "line 14: KeyError: 'cost'"),
    ("source", "good = place % 2", "good = place % (5 - place)", "line 9: ZeroDivisionError: integer modulo by zero"),
    ("partition", "return {f", "data.train[0].missing; return {f", "line 10: AttributeError: 'Record' object has no"),
    ("method", "return Own(training)", "return Own(missing)", "line 11: NameError: name 'missing' is not defined"),
    ("method", "mean = sum", "mean = missing or sum", "line 22: NameError: name 'missing'"),
])  # fmt: skip
def test_an_error_in_the_module_is_one_sentence_of_the_command(attempt, ficpd, tmp_path, part, old, new, words):
    with pytest.raises(Exception, match=words.rpartition(": ")[2]):  # in Python it is the error itself
        attempt(part, old, new)
    said = ficpd("run", tmp_path / "own.toml", "--out", tmp_path / "again").said(1)
    assert "Traceback" not in said
    assert f"{part} 'mistaken" in said
    assert words in said


def test_a_setting_that_a_library_would_not_know_is_an_error(attempt):
    lost = 'return {"name": "TASK", "labels": self.config.labels}'
    with pytest.raises(ConfigError, match="leaves out gamma"):
        attempt("task", STORED, lost, "task.gamma=2")


@pytest.mark.parametrize("name", ["num_clients=3", "column=site"])
def test_a_partition_of_ones_own_takes_its_settings_by_options(attempt, name):
    with pytest.raises(ConfigError, match=r"does not use .* go into partition\.options"):
        attempt("", "", "", f"partition.{name}")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (UPDATE, "pass"),
        ("yield from tune(", "tune("),
        (UPDATE, UPDATE.replace("tuned - prompt", "tuned[0]")),
        (UPDATE, UPDATE.replace("tuned - prompt", "tuned - prompt, 'more': prompt")),
        (UPDATE, UPDATE.replace("tuned - prompt", "tuned / 0")),
    ],
    ids=["no update", "no generator", "another shape", "another array", "not finite"],
)
@pytest.mark.parametrize("privacy", [(), (PRIVATE,)], ids=["open", "private"])
def test_a_first_round_without_any_update_is_an_error(attempt, old, new, privacy):
    """The table would show the figures of a prompt that nobody tuned."""
    with pytest.raises(RunError, match=r"own, round 1: no update of its 2 clients can be used\. part-0: "):
        attempt("method", old, new, *privacy)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (FEATURES, "return F.normalize(sums_SD, dim=-1)", "forward gives a Tensor; expected a ModelOutput"),
        (FEATURES, "return ModelOutput(F.pad(sums_SD, (0, 4)))", "forward gives the shape (2, 20); expected (2, 16)"),
        (FEATURES, "return ModelOutput(sums_SD[:1])", "forward gives the shape (1, 16)"),
        (FEATURES, "return ModelOutput(sums_SD.double())", "expected torch.float32"),
        (FEATURES, "return ModelOutput(sums_SD.detach())", "no gradient for the prompt"),
        (FEATURES, "return ModelOutput(sums_SD - sums_SD.mean(0))", "rows never see each other"),
        (FEATURES, "return ModelOutput(sums_SD + prompts_SPD.sum() - prompts_SPD.detach().sum())", "another row's prompt"),
        (" + prompts_SPD.sum(1)", "", "no gradient for the prompt"),
        ("return EncodedInput(torch.tensor(ids), len(ids))", "return torch.tensor(ids)", "tokenize gives a Tensor"),
        ("[: self.max_tokens - room]", "", "tokenize gives 128 tokens; expected max_tokens - room = 60"),
        ("torch.arange(num_tokens)", "torch.arange(3)", "init_prompt gives the shape (3, 16)"),
        ("items = [self.tokenize(answer,", "return None; [self.tokenize(answer,", "scored = 0"),
        (', f"words:{width}"', ', f"words:{width}"; del self.fingerprint', "it has no `fingerprint`"),
        (TABLE, TABLE + "; self.table.requires_grad_()", "gives values with a gradient; expected none"),
        ("10 * F.normalize(torch.stack", "10 * torch.ones((), requires_grad=True) * F.normalize(torch.stack",
         "readout gives values with a gradient"),
        (FEATURES, FEATURES.replace("sums_SD", "9 * HiddenStates.of(hidden).states_STD.mean(1) + prompts_SPD.sum(1)"),
         "padding is masked"),
        (FEATURES, FEATURES.replace("sums_SD", "F.dropout(sums_SD)"), "and there is no dropout"),
    ],
)  # fmt: skip
def test_a_backbone_that_breaks_its_contract_is_refused(attempt, old, new, words):
    with pytest.raises(BackboneError) as found:
        attempt("backbone", old, new)
    assert words in str(found.value)


def test_fewer_synthetic_inputs_than_asked_for_are_an_error(attempt):
    with pytest.raises(BackboneError, match=r"synthetic_inputs gives 9 inputs; expected \d+"):
        attempt("backbone", "for place in range(number)", "for place in range(min(number, 9))", PRIVATE)


@pytest.mark.parametrize("new", ["return loss / loss.mean()", "return loss - loss.detach().mean()"])
def test_a_loss_that_depends_on_other_rows_is_refused_with_privacy(attempt, new):
    with pytest.raises(PrivacyError, match="the loss of a record among others differs from its loss alone"):
        attempt("task", LOSS, new, PRIVATE)


def test_a_kind_of_ones_own_needs_a_name(tmp_path):
    with pytest.raises(ConfigError, match=r"backbone.*needs a `name`"):
        ficpd.run("quickstart", tmp_path / "run", changes=["backbone={kind='lab.words'}"])


def test_a_failed_client_has_its_traceback_in_the_log(attempt, caplog):
    caplog.set_level("INFO")
    with pytest.raises(FicpdError, match="ficpd run -v"):
        attempt("method", UPDATE, "return prompt.missing", PRIVATE)
    assert any(record.exc_info for record in caplog.records)


def test_more_steps_than_planned_are_refused_with_the_function_that_plans_them(attempt, ficpd, tmp_path):
    """The run ends before them; its table would show the figures of a prompt that nobody tuned."""
    tuning = "tune(self.training, client, assignment, prompt"
    result = attempt("method", tuning, tuning + ", steps=50", PRIVATE).result
    assert result.num_rounds == 0
    assert "state a method's steps in `local_workload`" in result.stopped
    _, shown, said = ficpd("run", tmp_path / "own.toml", "--set", PRIVATE, "--out", tmp_path / "again")
    assert "Stopped early. round 1 does not take place" in " ".join(shown.split())
    assert "own 1/1 rounds" not in said + shown
