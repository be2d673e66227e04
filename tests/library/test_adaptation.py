"""Fitting a library to few records: each way where it should help, and the choice between them.

The library is a real one: three tasks on a random transformer, a prompt tuned for each, and their mean as the global one.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import berts
import decoders
import small
from ficpd import rng
from ficpd.backbones import tiny
from ficpd.backbones.query_engine import QueryEngine, run_queries
from ficpd.errors import LibraryError
from ficpd.evaluation.evaluate import mixture_probabilities, predictions_of
from ficpd.library import adaptation as ways
from ficpd.library import selection
from ficpd.library.adaptation import STRATEGIES, AdaptedPrompt, FewShotSet
from ficpd.library.library import PromptLibrary, prompt_keys
from ficpd.library.mixture import stack_members
from ficpd.library.selection import cross_validate, default_variant, one_standard_error_rule, prepare_shots
from ficpd.methods.shared.mixture import Candidate, _mixed, weigh_members
from ficpd.optimizers import LocalTrainingConfig
from ficpd.tasks import classification, generation
from ficpd.tasks.demonstrations import Demonstrations, balanced, is_in_context, mix_readout, readout_of
from ficpd.types import Predictor, Prompt, Query, Readout, Record

MEANINGS = {
    "mood": {"good": ["good", "fine"], "bad": ["bad", "dull"]},
    "heat": {"warm": ["warm", "sunny"], "cold": ["cold", "icy"]},
    "size": {"large": ["large", "huge"], "small": ["small", "narrow"]},
}
TRAINING = LocalTrainingConfig(learning_rate=0.1)


def task_of(name: str, **labels: str) -> classification.Classification:
    texts = {label: " ".join(words) for label, words in MEANINGS.get(name, {}).items()}
    return classification.build(classification.Config(labels=labels or texts, instruction="it was"))


def records(name: str, count: int, seed: int = 0) -> list[Record]:
    """Short sentences, both labels equally often, each told by one word."""
    random, found = rng.make_generator(name, seed), []
    for place in range(count):
        label = list(MEANINGS[name])[place % 2]
        words = [small.OTHER[int(torch.randint(10, (1,), generator=random))] for _ in range(1 + place % 3)]
        words.insert(1, MEANINGS[name][label][int(torch.randint(2, (1,), generator=random))])
        found.append(Record(f"{name} {place}", {"text": " ".join(words), "target": label}))
    return small.shuffled(found, seed)


@pytest.fixture(scope="module")
def model() -> QueryEngine:
    return QueryEngine(small.backbone(width=32))


@pytest.fixture(scope="module")
def library(model) -> PromptLibrary:
    begin, prompts = small.start(model, task_of("mood"), 4, 0), {}
    for name in MEANINGS:
        shots = prepare_shots(PromptLibrary(begin, {}, {}), records(name, 32, 1), task_of(name), model, TRAINING)
        work = ways._adam(shots, begin.vectors_PD, 0.1, 0.0, (30,))
        prompts[name] = begin.with_vectors(run_queries(model, work)[30])
    mean_PD = torch.stack([prompt.vectors_PD for prompt in prompts.values()]).mean(0)
    prompts = {"global": begin.with_vectors(mean_PD), **prompts}
    tasks = {name: task_of(name) for name in MEANINGS}
    card = {
        "backbone": {"name": "tiny", "kind": "tiny", "options": {"width": 32}},
        "tasks": {name: dict(task.to_config()) for name, task in tasks.items()},
        "training": {"learning_rate": 0.1},
    }
    keys = prompt_keys(prompts, tasks, {name: [name] for name in tasks}, model.backbone)
    return PromptLibrary(begin, prompts, card, keys)


def shots_of(library: PromptLibrary, model: QueryEngine, name: str = "heat", count: int = 8, **more: Any) -> FewShotSet:
    return prepare_shots(library, records(name, count, 3), more.get("task", task_of(name)), model, TRAINING)


def fit(way: str, shots: FewShotSet, model: QueryEngine) -> dict[str, AdaptedPrompt]:
    return run_queries(model, STRATEGIES[way](shots))


def loss(fitted: AdaptedPrompt, task, given: Sequence[Record], model: QueryEngine) -> float:
    batch = fitted.encode(task, given, model.backbone)
    if fitted.mixture is not None:
        found_BC = run_queries(model, mixture_probabilities(fitted.predictors(), batch))
        return float(torch.nn.functional.nll_loss(found_BC.log(), batch.targets))
    return float(model.answer([Query(fitted.prompt.vectors_PD[None], batch)])[0].loss_KB.mean())


def test_leave_takes_the_global_prompt_or_the_start(library, model):
    """Whichever fits better; nothing else, however well it fits."""
    shots = shots_of(library, model)
    losses = dict(zip(library.candidates(), shots.loss_JB.mean(1).tolist(), strict=True))
    assert fit("leave", shots, model)["leave"].note == min(("global", "start"), key=losses.__getitem__)
    worse = {"global": library.start.with_vectors(library.start.vectors_PD * 30), "heat": library.prompts["heat"]}
    given = replace(library, prompts=worse)
    assert fit("leave", shots_of(given, model), model)["leave"].note == "start"
    lone = PromptLibrary(library.start, {"heat": library.prompts["heat"]}, {})
    assert fit("leave", shots_of(lone, model), model)["leave"].note == "start"


@pytest.mark.parametrize("name", MEANINGS)
def test_the_nearest_is_the_prompt_made_for_the_task_and_better_than_the_global(library, model, name):
    shots = shots_of(library, model, name)
    found = fit("nearest", shots, model)["nearest"]
    assert found.note == name
    test = records(name, 48, 9)
    left = fit("leave", shots, model)["leave"]
    assert loss(found, task_of(name), test, model) < loss(left, task_of(name), test, model) - 0.02


def mixture() -> tuple[classification.Classification, list[Record]]:
    """A task that no prompt was made for and two of them know half of."""
    task = task_of("", good="good fine", bad="bad dull", warm="warm sunny", cold="cold icy")
    return task, small.shuffled([*records("mood", 16, 3), *records("heat", 16, 3)], 1)


class Mute(tiny.Tiny):
    """The same backbone behind a door that lets no gradient out."""

    supports_gradients = False


def test_without_gradients_nothing_is_tuned(library):
    muted = Mute(tiny.Config(width=32), torch.float32, small.CPU, "tiny")
    model, given = QueryEngine(muted), records("heat", 8, 3)
    adapted = selection.adapt(library, given, task_of("heat"), model, TRAINING)
    assert {"leave", "nearest", "ensemble"} == adapted.table.keys()
    assert not any(way.startswith("tune") for way in adapted.table)
    with pytest.raises(LibraryError, match=r"--how tune: tiny gives no gradients"):
        selection.adapt(library, given, task_of("heat"), model, TRAINING, "tune")


def test_prompts_of_words_are_not_tuned(library, tmp_path):
    backbone = berts.load(berts.bert(tmp_path))
    ids = torch.tensor(backbone.vocabulary.ids("the film was good"))[:, None]
    words, model = PromptLibrary(Prompt(ids, backbone.fingerprint, 0), {}, {}), QueryEngine(backbone)
    task, given = task_of("mood"), records("mood", 8, 3)
    adapted = selection.adapt(words, given, task, model, TRAINING)
    assert adapted.table.keys() >= {"leave", "demonstrations"}
    assert not any(way.startswith("tune") for way in adapted.table)
    with pytest.raises(LibraryError, match="--how tune: the library's prompts are words"):
        selection.adapt(words, given, task, model, TRAINING, "tune")


def test_tuning_goes_on_from_the_unchanged_prompt(library, model):
    task, given = mixture()
    shots = prepare_shots(library, given, task, model, TRAINING)
    begin, found = fit("leave", shots, model)["leave"], fit("tune", shots, model)
    assert list(found) == ["tune 4", "tune 20"]
    losses = [loss(one, task, given, model) for one in (begin, found["tune 4"], found["tune 20"])]
    assert losses[0] - 0.01 > losses[1] > losses[2]
    far = [float((one.prompt.vectors_PD - begin.prompt.vectors_PD).abs().max()) for one in found.values()]
    assert far[0] < far[1] < 1.2 * 20 * ways.TUNE_RATE * 0.1


def test_tuning_is_pulled_back_to_where_it_began(library, model, monkeypatch):
    shots = shots_of(library, model)
    begin_PD, far = fit("leave", shots, model)["leave"].prompt.vectors_PD, []
    for pull in (0.0, 50.0):
        monkeypatch.setattr(ways, "TUNE_PULL", pull)
        far.append(float((fit("tune", shots, model)["tune 20"].prompt.vectors_PD - begin_PD).norm()))
    assert far[1] < 0.5 * far[0]


def test_a_head_tells_what_bad_label_texts_do_not(library, model):
    """The labels' texts say nothing; the records' features do. The prompt stays."""
    task = task_of("", warm="one", cold="two")
    shots = prepare_shots(library, records("heat", 12, 3), task, model, TRAINING)
    left, fitted = fit("leave", shots, model)["leave"], fit("head", shots, model)["head"]
    test = records("heat", 48, 9)
    assert loss(fitted, task, test, model) < loss(left, task, test, model) - 0.2
    assert torch.equal(left.prompt.vectors_PD, fitted.prompt.vectors_PD)


def test_a_head_begins_at_the_readout_that_the_library_learned(library, model):
    """The labels' texts say nothing, and four records little; the learned readout knows."""
    task = task_of("", warm="one", cold="two")
    known = Readout(task_of("heat").readout(model.backbone), torch.zeros(2), torch.full((2,), 0.5))
    taught = replace(library, card={**library.card, "tasks": {"heat": dict(task.to_config())}}, learned={"heat": known})
    test, few = records("heat", 48, 9), records("heat", 4, 3)
    heads = (
        fit("head", prepare_shots(given, few, task, model, TRAINING), model)["head"] for given in (taught, library)
    )
    with_it, without = (loss(head, task, test, model) for head in heads)
    assert with_it < without - 0.05


def test_cross_validation_counts_the_bias_of_a_learned_readout(library, model):
    task = task_of("heat")
    shots = records("heat", 12, 3)
    losses = []
    for bias in (0.0, 20.0):
        known = Readout(task.readout(model.backbone), torch.tensor([bias, -bias]), torch.full((2,), 0.5))
        card = {**library.card, "tasks": {"heat": dict(task.to_config())}}
        taught = replace(library, card=card, learned={"heat": known})
        table = cross_validate(prepare_shots(taught, shots, task, model, TRAINING), ["leave"], model)
        losses.append(table["leave"]["loss"])
    assert losses[1] > losses[0] + 0.5


def test_a_decoder_has_no_rows_for_a_head_to_replace(decoder):
    task = task_of("sentiment is", good="good", bad="bad")
    begin = Prompt(decoder.backbone.init_prompt("the film", 2, 1, 0), decoder.backbone.fingerprint, 1)
    given = [Record(str(i), {"text": "fine", "target": target}) for i, target in enumerate(["good", "bad"] * 3)]
    found = selection.adapt(PromptLibrary(begin, {}, {}), given, task, decoder, TRAINING)
    assert "head" not in found.table
    with pytest.raises(LibraryError, match="expected a classification on an encoder"):
        selection.adapt(PromptLibrary(begin, {}, {}), given, task, decoder, TRAINING, "head")


@pytest.mark.parametrize("count", [4, 24])
def test_an_ensemble_averages_the_probabilities_of_three_readouts(library, model, count):
    task, test = task_of("heat"), records("heat", 20, 9)
    shots = shots_of(library, model, count=count)
    left, headed, shown, averaged = (
        list(fit(way, shots, model).values())[-1] for way in ("leave", "head", "demonstrations", "ensemble")
    )

    def shares(fitted: AdaptedPrompt) -> torch.Tensor:
        batch = fitted.encode(task, test, model.backbone)
        return run_queries(model, mixture_probabilities(fitted.predictors(), batch))

    texts = 8 / (8 + count)
    wanted_BC = texts * shares(left) + (1 - texts) / 2 * (shares(headed) + shares(shown))
    assert small.close(shares(averaged), wanted_BC)
    assert not small.close(shares(averaged), shares(left), 1e-3)
    assert torch.equal(averaged.prompt.vectors_PD, left.prompt.vectors_PD)


@pytest.mark.parametrize("count", [1, 12])
def test_an_ensemble_of_one_class_keeps_the_rows_of_the_others(library, model, count):
    given = [record for record in records("heat", 24, 3) if record.fields["target"] == "cold"][:count]
    found = selection.adapt(library, given, task_of("heat"), model, TRAINING, "ensemble")
    assert found.way == "ensemble"
    assert torch.isfinite(found.fitted.mixture.rows_MCD).all()


def test_a_mixture_tells_what_bad_label_texts_do_not(library, model):
    task = task_of("", warm="one", cold="two")
    shots = prepare_shots(library, records("heat", 24, 3), task, model, TRAINING)
    left, fitted = fit("leave", shots, model)["leave"], fit("mixture", shots, model)["mixture"]
    test = records("heat", 48, 9)
    batch = task.encode(test, model.backbone, library.start)
    answers = run_queries(model, predictions_of(task, fitted.predictors(), batch))
    right = sum(found == truth for found, truth in zip(answers, task.targets(test), strict=True))
    batch = left.encode(task, test, model.backbone)
    usual = run_queries(model, predictions_of(task, left.predictors(), batch))
    assert right > sum(found == truth for found, truth in zip(usual, task.targets(test), strict=True)) + 5
    assert fitted.mixture is not None
    assert float(fitted.mixture.weight_M.sum()) == pytest.approx(1)


@pytest.mark.parametrize(("number", "mixed"), [(16, False), (31, False), (32, True)])
def test_auto_on_an_encoder_tunes_nothing_and_mixes_enough_records(library, model, number, mixed):
    asked = []

    class Heard(QueryEngine):
        def answer(self, queries):
            asked.extend(queries)
            return super().answer(queries)

    found = selection.adapt(library, records("heat", number, 3), task_of("heat"), Heard(model.backbone), TRAINING)
    assert asked
    assert not any(query.grad for query in asked)
    assert ("mixture" in found.table) is mixed


def test_a_mixture_in_a_library_answers_as_the_clients_of_a_run_do(library, model):
    """The same weights, of rows and biases instead of functions."""
    task, test = task_of("heat"), records("heat", 48, 9)
    shots = prepare_shots(library, records("heat", 24, 3), task, model, TRAINING)
    readout = readout_of(shots.batch)
    candidates = [Candidate(library.prompts[name].vectors_PD, readout) for name in ("global", "heat")]
    members, weights = run_queries(model, weigh_members(candidates, shots.batch))
    stacked, batch = stack_members(candidates, members, weights), task.encode(test, model.backbone, library.start)
    of_run = [
        Predictor(candidate.prompt_PD, _mixed(of, weight_M), float(weight_M.sum()))
        for candidate, of, weight_M in zip(candidates, members, weights, strict=True)
    ]
    one, other = (run_queries(model, mixture_probabilities(found, batch)) for found in (stacked.predictors(), of_run))
    assert (one - other).abs().max() < 2e-3  # negligible members are left out in another way
    assert float(one.std()) > 0.05


def test_demonstrations_tell_what_bad_label_texts_do_not(library, model):
    """The labels' texts say nothing; the examples do."""
    task = task_of("", warm="one", cold="two")
    shots = prepare_shots(library, records("heat", 12, 3), task, model, TRAINING)
    left, shown = fit("leave", shots, model)["leave"], fit("demonstrations", shots, model)
    test = records("heat", 48, 9)
    assert list(shown) == ["demonstrations 0.4", "demonstrations 0.8"]
    losses = [loss(one, task, test, model) for one in (left, *shown.values())]
    assert losses[0] - 0.1 > losses[1] > losses[2]
    assert torch.equal(left.prompt.vectors_PD, shown["demonstrations 0.8"].prompt.vectors_PD)


def test_the_mixed_readout():
    own_CD = torch.eye(3) * 20
    features_BD = torch.tensor([[1.0, 0, 0], [3.0, 0, 0], [0, 0, 1.0]])
    rows = mix_readout(own_CD, features_BD, torch.tensor([0, 0, 2]), 0.9)
    weights = 0.9 * 2 / 3, 0.9 / 2
    apart = torch.tensor([10.0, 0, -10.0])
    middle = torch.full((3,), 20 / 3)
    assert small.close(rows[0], (1 - weights[0]) * own_CD[0] + weights[0] * (middle + apart))
    assert torch.equal(rows[1], own_CD[1])
    assert small.close(rows[2], (1 - weights[1]) * own_CD[2] + weights[1] * (middle - apart))
    assert torch.equal(own_CD, torch.eye(3) * 20)
    assert torch.equal(mix_readout(own_CD, features_BD, torch.tensor([1, 1, 1]), 0.9), own_CD)


def test_examples_are_taken_from_each_class_in_turn():
    given = [Record(str(i), {"target": label}) for i, label in enumerate("aaabca")]
    assert [record.key for record in balanced(given)] == ["0", "3", "4", "1", "2", "5"]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> QueryEngine:
    return QueryEngine(decoders.load(decoders.write(tmp_path_factory.mktemp("llama")), max_tokens=30))


def ask(decoder: QueryEngine, texts: tuple[str, ...], text: str = "the film was very good", **labels: str) -> str:
    """What a decoder reads of a text with examples before it."""
    given = {"labels": labels or {"g": "good", "b": "bad"}, "instruction": "sentiment is"}
    task = classification.build(classification.Config(**given))
    prompt = Prompt(torch.zeros(2, 32), decoder.backbone.fingerprint)
    batch = Demonstrations(texts).encode(task, [Record("a", {"text": text})], decoder.backbone, prompt)
    assert max(item.length for item in batch.items[0]) + 2 <= 30
    return decoder.backbone.tokenizer.decode(batch.items[0][0].content)


def test_a_decoder_reads_examples_before_the_text(decoder, model):
    assert is_in_context(decoder.backbone)
    assert not is_in_context(model.backbone)
    plain, read = ask(decoder, ()), ask(decoder, ("bad\nsentiment is bad", "fine\nsentiment is good"))
    assert read.endswith(plain)
    assert read.split() == ["bad", "sentiment", "is", "bad", "fine", "sentiment", "is", "good", *plain.split()]


def test_only_examples_that_fit_whole_are_read(decoder):
    long = " ".join(["story"] * 12) + "\nsentiment is bad"
    assert "story" in ask(decoder, (long,))
    read = ask(decoder, (long, long, "fine\nsentiment is good"))
    assert read.count("story") == 12
    assert "fine" not in read
    text = " ".join(["very"] * 40)
    assert ask(decoder, ("fine",), text) == ask(decoder, (), text)  # a text that fills the context is not cut for them
    shown = (ask(decoder, examples, "film", g="good and long", b="bad") for examples in (("fine",), ()))
    assert next(shown) != next(shown)


def test_a_decoder_is_adapted_with_examples_in_its_context(decoder):
    task = classification.build(classification.Config(labels={"g": "good", "b": "bad"}, instruction="sentiment is"))
    begin = Prompt(decoder.backbone.init_prompt("the film", 2, 1, 0), decoder.backbone.fingerprint, 1)
    given = [Record(str(i), {"text": text, "target": "gb"[i % 2]}) for i, text in enumerate(["fine", "dull"] * 3)]
    found = selection.adapt(PromptLibrary(begin, {}, {}), given, task, decoder, TRAINING, "demonstrations")
    assert found.way == "demonstrations"
    assert found.fitted.demonstrations.texts[:2] == ("fine\nsentiment is good", "dull\nsentiment is bad")
    assert list(found.table) == ["demonstrations"]


def test_auto_is_never_worse_than_its_default_on_its_own_measure(library, model):
    for name, count, default in (("mood", 12, "leave"), ("size", 16, "leave"), ("size", 32, "ensemble")):
        found = selection.adapt(library, records(name, count, 5), task_of(name), model, TRAINING)
        assert found.table[found.way]["loss"] <= found.table[default]["loss"]
        assert {"loss", "error", "accuracy", "f1"} <= found.table["leave"].keys()
        assert found.way in selection.describe_choice(found.way, found.said, "auto")[0]


def test_auto_finds_what_helps_where_the_label_texts_do_not(library, model):
    task = task_of("", warm="one", cold="two")
    found = selection.adapt(library, records("heat", 24, 3), task, model, TRAINING)
    assert found.way == "ensemble"
    assert found.table["ensemble"]["loss"] < found.table["leave"]["loss"] - 0.1
    test = records("heat", 48, 9)
    left = fit("leave", prepare_shots(library, records("heat", 24, 3), task, model, TRAINING), model)["leave"]
    assert loss(found.fitted, task, test, model) < loss(left, task, test, model) - 0.1


def rows(**losses: tuple[float, float]) -> dict[str, dict[str, float]]:
    return {name: {"loss": loss, "error": error} for name, (loss, error) in losses.items()}


@pytest.mark.parametrize(("table", "way"), [
    (rows(leave=(1.0, 0.1), nearest=(0.9, 0.0)), "leave"),
    (rows(leave=(1.0, 0.11), nearest=(0.8, 0.0)), "leave"),
    (rows(leave=(1.0, 0.09), nearest=(0.8, 0.0)), "nearest"),
    (rows(leave=(1.0, 0.1), nearest=(0.7, 0.3), tune=(0.5, 0.0)), "nearest"),
    (rows(leave=(1.0, 0.1), nearest=(1.2, 0.9), tune=(0.5, 0.0)), "tune"),  # too uncertain to count, and worse
    (rows(leave=(1.0, 0.0), nearest=(1.0, 0.0)), "leave"),
])  # fmt: skip
def test_the_simplest_within_an_error_of_the_best_is_chosen(table, way):
    assert one_standard_error_rule(table, "leave") == way


@pytest.mark.parametrize(("table", "count", "way"), [
    (rows(leave=(0.95, 0.1), nearest=(0.9, 0.0), ensemble=(1.0, 0.05)), 16, "ensemble"),
    (rows(leave=(0.95, 0.1), nearest=(0.9, 0.0), ensemble=(1.0, 0.05)), 15, "leave"),
    (rows(leave=(1.0, 0.04), nearest=(0.9, 0.05), ensemble=(0.95, 0.05), mixture=(0.9, 0.0)), 15, "nearest"),
    (rows(leave=(0.93, 0.02), nearest=(1.1, 0.05), ensemble=(0.95, 0.02), mixture=(0.9, 0.0)), 64, "mixture"),
    (rows(leave=(0.9, 0.0), nearest=(1.1, 0.05), ensemble=(0.95, 0.02)), 64, "leave"),
])  # fmt: skip
def test_the_ensemble_of_enough_records_is_taken_unless_another_is_surely_better(table, count, way):
    assert one_standard_error_rule(table, default_variant(table, count)) == way


def test_a_task_that_the_library_knows_needs_more_records_for_an_ensemble():
    names = ["leave", "nearest", "ensemble"]
    found = [default_variant(names, *asked) for asked in ((15, False), (16, False), (31, True), (32, True))]
    assert found == ["leave", "ensemble", "leave", "ensemble"]
    assert default_variant(["leave", "tune 4"], 64) == "leave"


def test_the_error_is_that_of_the_difference_to_the_best():
    losses = {"leave": torch.tensor([1.0, 3.0, 5.0, 7.0]), "tune": torch.tensor([0.0, 2.0, 4.0, 6.0])}
    table = selection._table(losses, {way: [{"accuracy": 0.5}, {"accuracy": 1.0}] for way in losses})
    assert table["leave"] == {"loss": 4.0, "error": 0.0, "accuracy": 0.75}  # always one more: nothing uncertain in it
    assert one_standard_error_rule(table, "leave") == "tune"


def test_how_sure_a_way_is_counts_for_nothing():
    """The same answers with logits twice as far apart are as good; better answers are better, however timid."""
    random, targets_B = torch.Generator().manual_seed(0), torch.arange(30) % 3
    logits_BC = torch.nn.functional.one_hot(targets_B, 3) + torch.randn(30, 3, generator=random)

    def mean(logits_BC: torch.Tensor) -> float:
        held_out = selection.HeldOutResult(torch.full((30,), 9.0), [], logits_BC)
        return float(selection._comparable(held_out, targets_B).mean())

    assert mean(2 * logits_BC) == pytest.approx(mean(logits_BC))
    timid = 0.2 * (logits_BC + torch.nn.functional.one_hot(targets_B, 3))
    assert float(torch.nn.functional.cross_entropy(timid, targets_B)) > mean(logits_BC) > mean(timid)


def test_losses_of_tasks_without_labels_are_compared_as_they_are():
    held = selection.HeldOutResult(torch.tensor([1.0, 2.0]), [])
    assert torch.equal(selection._comparable(held, torch.tensor([0.3, 0.4])), held.loss_B)


def test_folds_part_the_records_and_deal_out_each_class(library, model):
    shots = shots_of(library, model, count=16)
    parts = shots.folds(5, 1)
    assert sorted(i for part in parts for i in part) == list(range(16))
    assert len(parts) == 5
    for part in parts:
        labels = [shots.records[i].fields["target"] for i in part]
        assert abs(labels.count("warm") - labels.count("cold")) <= 1
    assert parts == shots.folds(5, 1)
    assert parts != shots.folds(5, 2)
    assert [len(part) for part in shots.take(range(4)).folds(5, 1)] == [1, 1, 1, 1]


def test_no_subject_is_in_two_folds(library, model):
    shots = shots_of(library, model, count=16)
    named = [replace(record, subject=f"patient {place // 3}") for place, record in enumerate(shots.records)]
    for seed in range(3):
        parts = replace(shots, records=named).folds(5, seed)
        assert sorted(i for part in parts for i in part) == list(range(16))
        of = [{named[i].subject for i in part} for part in parts]
        assert sum(map(len, of)) == 6 == len(set().union(*of))
    assert len(replace(shots, records=named[:5]).folds(5, 1)) == 2


def test_records_of_one_subject_cannot_be_tried_on_each_other(library, model):
    of_one = [replace(record, subject="patient 1") for record in shots_of(library, model, count=16).records]
    assert "of one subject" in selection._lacking(small.classes(), of_one)


def test_what_is_tried_on_a_record_has_not_seen_it(library, model):
    """A record whose label is a lie is lost on by every way that was not fitted to it."""
    given = records("heat", 12, 3)
    lie = {"warm": "cold", "cold": "warm"}[given[0].fields["target"]]
    given[0] = Record(given[0].key, {**given[0].fields, "target": lie})
    shots = prepare_shots(library, given, task_of("heat"), model, TRAINING)
    table = cross_validate(shots, ["demonstrations"], model)
    fitted = fit("demonstrations", shots, model)
    for variant, one in fitted.items():
        assert loss(one, task_of("heat"), given, model) < table[variant]["loss"] - 0.02


def test_folds_are_answered_in_lock_step(library, model, monkeypatch):
    shots = shots_of(library, model, count=10)
    asked: list[int] = []
    answer = QueryEngine.answer
    monkeypatch.setattr(
        QueryEngine, "answer", lambda self, queries: asked.append(len(queries)) or answer(self, queries)
    )
    monkeypatch.setattr(selection, "ONCE", 1)
    cross_validate(shots, ["tune"], model)
    assert asked == [5] * (max(ways.TUNE_STEPS) + len(ways.TUNE_STEPS)) + [0]


def test_a_way_that_is_named_is_taken_and_its_best_variant_tried(library, model):
    given = records("heat", 8, 3)
    for way in STRATEGIES:
        found = selection.adapt(library, given, task_of("heat"), model, TRAINING, way)
        assert found.way.startswith(way)
        assert all(variant.startswith(way) for variant in found.table)
        assert f"{found.way} as requested" in found.said


@pytest.mark.slow
def test_a_seed_fixes_an_adaptation(library, model):
    given = records("size", 40, 3)
    one, two, other = (
        selection.adapt(library, given, task_of("size"), model, TRAINING, "tune", seed).fitted.prompt.vectors_PD
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_with_too_few_records_the_prompt_made_for_the_task_is_taken(library, model, count):
    found = selection.adapt(library, records("size", count, 3), task_of("size"), model, TRAINING)
    assert (found.way, found.fitted.note, found.table) == ("nearest", "size", {})
    assert f"{count} records are too few" in found.said
    assert "took size, tuned for a similar task (1.00)" in found.said


@pytest.mark.parametrize("count", [0, 2])
def test_with_too_few_records_of_a_task_unlike_all_the_start_is_left(library, model, count):
    far = {name: -key_D for name, key_D in library.keys.items()}
    found = selection.adapt(replace(library, keys=far), records("size", count, 3), task_of("size"), model, TRAINING)
    assert (found.way, found.fitted.note) == ("leave", "start")
    assert torch.equal(found.fitted.prompt.vectors_PD, library.start.vectors_PD)
    assert "no prompt was tuned for a similar task" in found.said


def test_with_one_class_nothing_is_tried(library, model):
    given = [record for record in records("heat", 24, 3) if record.fields["target"] == "cold"]
    found = selection.adapt(library, given, task_of("heat"), model, TRAINING)
    assert (found.way, found.fitted.note) == ("nearest", "heat")
    assert "all 12 records have the label 'cold'" in found.said
    asked = selection.adapt(library, given, task_of("heat"), model, TRAINING, "demonstrations")
    assert asked.table == {}
    assert "as requested" in asked.said


def test_without_keys_and_records_the_global_prompt_is_left(library, model):
    given = replace(library, keys={})
    found = selection.adapt(given, [], task_of("heat"), model, TRAINING)
    assert (found.way, found.fitted.note) == ("leave", "global")
    lone = PromptLibrary(library.start, {}, {})
    assert selection.adapt(lone, [], task_of("heat"), model, TRAINING).fitted.note == "start"


def test_a_library_of_five_hundred_is_adapted(library, model):
    random = torch.Generator().manual_seed(0)
    begin = library.start
    many = {f"p{i}": begin.with_vectors(begin.vectors_PD + torch.randn(4, 32, generator=random)) for i in range(498)}
    kept = {name: library.prompts[name] for name in ("global", "heat")}
    given = replace(library, prompts={**many, **kept}, keys={})
    found = selection.adapt(given, records("heat", 4, 3), task_of("heat"), model, TRAINING, "nearest")
    shots = selection.prepare_shots(given, records("heat", 4, 3), task_of("heat"), model, TRAINING)
    assert found.fitted.note == list(given.candidates())[int(shots.loss_JB.mean(1).argmin())]


def test_numbers_are_adapted_to_without_demonstrations(model):
    task = small.numbers()
    begin = small.start(model, task, 4, 0)
    moved = begin.with_vectors(begin.vectors_PD + 0.1)
    given = small.records(12, 3, real=True)
    found = selection.adapt(PromptLibrary(begin, {"global": moved}, {}), given, task, model, TRAINING)
    assert "rmse" in found.table["leave"]
    assert not any("demonstrations" in way for way in found.table)
    with pytest.raises(LibraryError, match="expected a classification without a tuned head"):
        selection.adapt(PromptLibrary(begin, {}, {}), given, task, model, TRAINING, "demonstrations")


def test_texts_are_adapted_to_by_their_loss_alone(decoder):
    """Nothing is written to find out which way is best."""
    task = generation.build(generation.Config(instruction="sentiment is", max_new_tokens=4))
    begin = Prompt(decoder.backbone.init_prompt("the film", 2, 1, 0), decoder.backbone.fingerprint, 1)
    texts = enumerate(["fine", "dull", "bad", "long"])
    given = [Record(str(i), {"text": text, "target": "very good"}) for i, text in texts]
    found = selection.adapt(PromptLibrary(begin, {}, {}), given, task, decoder, TRAINING)
    assert found.table["leave"].keys() == {"loss", "error"}
    assert not any("demonstrations" in way for way in found.table)
    assert found.way.startswith("tune")


def test_a_tuned_head_serves_its_own_labels_only(model):
    task = small.classes(tuned_head=True)
    begin = small.start(model, task, 4, 0)
    found = selection.adapt(PromptLibrary(begin, {}, {}), small.records(12, 3), task, model, TRAINING)
    assert not any("demonstrations" in way for way in found.table)
    with pytest.raises(LibraryError, match="have a tuned head of 2 rows and this task needs 0"):
        selection.adapt(PromptLibrary(begin, {}, {}), small.records(12, 3), small.classes(), model, TRAINING)


def test_what_cannot_be_done_is_said(library, model):
    with pytest.raises(LibraryError, match="unknown strategy 'mixtur'; did you mean 'mixture'"):
        selection.adapt(library, records("heat", 8), task_of("heat"), model, TRAINING, "mixtur")
    with pytest.raises(LibraryError, match=r"no records for --how tune"):
        selection.adapt(library, [], task_of("heat"), model, TRAINING, "tune")
    other = QueryEngine(small.backbone(width=16))
    with pytest.raises(LibraryError, match="Load the backbone"):
        selection.adapt(library, records("heat", 8), task_of("heat"), other, TRAINING)
    assert selection.adapt(library, [], task_of("heat"), model, TRAINING, "leave").way == "leave"
    assert selection.adapt(library, records("heat", 1), task_of("heat"), model, TRAINING, "tune").way == "tune 20"


@pytest.mark.slow
def test_a_real_library_is_adapted_to_labels_it_has_never_seen(minilm_run):
    """A short quick start's library (good or bad), and four records of each kind of text: where they come from."""
    from ficpd.data import loading
    from ficpd.library.session import load_library

    opened = load_library(minilm_run)
    rated = loading.load_all(loading.Config(source="ratings", columns={"text": "text", "target": "domain"}))
    by_domain: dict[str, list[Record]] = {}
    for record in small.shuffled(rated):
        by_domain.setdefault(record.fields["target"], []).append(record)
    few = [record for of in by_domain.values() for record in of[:4]]
    test = [record for of in by_domain.values() for record in of[4:44]]
    task = classification.build(classification.Config(labels={name: name.replace("_", " ") for name in by_domain}))
    training = LocalTrainingConfig(learning_rate=opened.library.card["training"]["learning_rate"])
    found = selection.adapt(opened.library, few, task, opened.model, training)
    left = selection.adapt(opened.library, few, task, opened.model, training, "leave")
    assert loss(found.fitted, task, test, opened.model) < loss(left.fitted, task, test, opened.model) - 0.1
