"""Experiments: read from TOML, changed by --set, written back whole; every error names what was meant."""

import re

import pytest

import small
from ficpd.errors import ConfigError
from ficpd.experiments import config, other_words
from ficpd.experiments.config import Experiment, parse, read, recipes, to_toml

TEXT = small.toml("records.csv")


def changed(*changes: str):
    return parse(TEXT, "my.toml", changes)


def refused(*changes: str, text: str = TEXT) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, "my.toml", changes)
    return str(caught.value)


@pytest.mark.parametrize(("change", "words"), [
    ("trainin.local_steps=3", "unknown part 'trainin'; did you mean 'training'?"),
    ("training.local_step=3", "training: unknown key 'local_step'; did you mean 'local_steps'?"),
    ("federation.num_round=3", "federation: unknown key 'num_round'; did you mean 'num_rounds'?"),
    ("backbone.nam=tiny", "backbone: unknown key 'nam'; did you mean 'name'?"),
    ("task.label={}", "task: unknown key 'label'; did you mean 'labels'?"),
    ("data.sorce=a.csv", "data: unknown key 'sorce'; did you mean 'source'?"),
    ("partition.colum=site", "partition: unknown key 'colum'; did you mean 'column'?"),
    ("engine.devise=cpu", "engine: unknown key 'devise'; did you mean 'device'?"),
    ("prompt.num_token=4", "prompt: unknown key 'num_token'; did you mean 'num_tokens'?"),
    ("method.proximal_weight=4", "method: unknown key 'proximal_weight'"),
])  # fmt: skip
def test_a_misspelt_key_names_the_nearest(change, words):
    assert f"my.toml: {words}" in refused(change)


@pytest.mark.parametrize(("text", "change", "words"), [
    ('privacy = { name = "record_gaussian", epsilon = 2.0 }', None, "federation: 'privacy' is no key of [federation]"),
    ('privacy = { name = "record_gaussian", epsilon = 2.0 }', None, "Write it as [privacy] on lines of its own"),
    ("baselines = []", None, "Write it above the first [section]"),
    ("num_tokens = 3", None, "'num_tokens' is no key of [federation]. It belongs to [prompt]"),
    ("", "epsilon=2", "'epsilon' is no part. It belongs to [privacy]"),
    ("", "method.learning_rate=2", "'learning_rate' is no key of [method]. It belongs to [training]"),
    ("", "labels={a='b'}", "'labels' is no part. It belongs to [task]"),
    ("", "instruction=It is", "'instruction' is no part. It belongs to [task]"),
    ("", "data.target=stars", "'target' is no key of [data]. It belongs to [data.columns]"),
    ("", "privacy.subject=patient", "'subject' is no key of [privacy]. It belongs to [data.columns]"),
    ("", "task.robust=1", "'robust' is no key of [task]. It belongs to [method]"),
])  # fmt: skip
def test_a_known_part_in_the_wrong_place_says_where_it_goes(text, change, words):
    assert words in refused(*([change] if change else []), text=TEXT + text)


@pytest.mark.parametrize(("change", "words"), [
    ("lr=0.1", "'lr' is no part; did you mean training.learning_rate?"),
    ("federation.lr=0.1", "federation: 'lr' is no key of [federation]; did you mean training.learning_rate?"),
    ("training.num-train-epochs=3", "did you mean training.local_steps (it counts steps, not epochs)?"),
    ("per_device_train_batch_size=4", "did you mean training.batch_size?"),
    ("rounds=5", "did you mean federation.num_rounds?"),
    ("training.rounds=5", "'rounds' is no key of [training]; did you mean federation.num_rounds?"),
    ("clients=5", "did you mean partition.num_clients?"),
    ("model=minilm", "did you mean backbone.name?"),
    ("model={name='minilm'}", "'model' is no part; did you mean [backbone]?"),
    ("privacy={name='record_gaussian',target_epsilon=2}", "did you mean privacy.epsilon?"),
    ("privacy={epsilon=2,max_grad_norm=1}", "'max_grad_norm' is no key of [privacy]; did you mean privacy.clip_norm?"),
    ("fraction-fit=0.5", "did you mean federation.clients_per_round (a number)?"),
    ("output_dir=runs", "did you mean --out of `ficpd run`?"),
    ("method.name=fedavgg",
     "unknown method 'fedavgg'; did you mean 'fedavg'? Known: analytic, centralized, class_means"),
    ("task.name=clasification", "did you mean 'classification'? Known: classification, generation, multiple_choice"),
    ("privacy.name=non", "'non'; did you mean 'none'? Known: "),
    ("baselines=['locl']", "unknown method 'locl'; did you mean 'local'? Known: "),
    ("method.name=my.module", "'my.module': No module named 'my'. A dotted name is a module"),
    ("training.local_steps=0", "my.toml: training.local_steps = 0: Input should be greater than or equal to 1"),
    ("training.local_steps=many", "my.toml: training.local_steps = 'many': Input should be a valid integer"),
    ("training.learning_rate=-1", "training.learning_rate = -1"),
    ("federation.num_rounds=-1", "federation.num_rounds = -1"),
    ("federation.clients_per_round=0", "federation.clients_per_round = 0"),
    ("prompt.num_tokens=0", "prompt.num_tokens = 0"),
    ("prompt.enters_at=-1", "prompt.enters_at = -1"),
    ("prompt.init=noise", "prompt.init = 'noise': Input should be 'text', 'vocabulary' or 'library'"),
    ("backbone.dtype=float64", "backbone.dtype = 'float64'"),
    ("data.test_fraction=1", "data.test_fraction = 1"),
    ("partition.kind=dirichlet", "kind 'dirichlet'"),
    ("task.labels={good='x'}", "task.labels"),
    ("seed=x", "seed = 'x'"),
    ("partition=iid", 'write partition = { kind = "iid" }'),
    ("engine=flower", 'write engine = { name = "flower" }'),
    ("federation=fast", "write federation = { num_rounds = ... }"),
    ("method.name=record_gaussian", "unknown method 'record_gaussian'; did you mean privacy.name = 'record_gaussian'?"),
    ("training.optimizer=fedprox", "did you mean method.name = 'fedprox'?"),
    ("privacy=record_gaussian", 'write privacy = { name = "record_gaussian" }'),
    ("data.columns=['text']", "data.columns = ['text']: a table is expected: write columns = { "),
    ("data.keep=site", "data.keep = 'site': a list is expected: write keep = [\"site\"]"),
    ("data.where={site='a'}", 'a list is expected: write site = ["a"]'),
    ("baselines=local", "my.toml: baselines = 'local': a list is expected: write baselines = [\"local\"]"),
    ("task.labels={good=1,bad=2}", 'task.labels.good = 1: a text is expected: write good = "1"'),
    ("task.labels={good='x'}", "my.toml: task.labels = {'good': 'x'}: expected 2 entries or more, not 1"),
    ("metrics=3", "my.toml: metrics = 3: a list is expected"),
    ("data.encoding=klingon", "data.encoding = 'klingon': unknown encoding"),
])  # fmt: skip
def test_a_mistake_in_a_change_names_what_was_meant(change, words):
    assert words in refused(change)


def test_every_word_of_other_software_stands_for_a_setting():
    keys = {part: {*model.model_fields} for part, model in {**config.PARTS, **config._named_models({})}.items()}
    for place in other_words.WORDS:
        part, _, key = place.partition(".")
        assert place.startswith("--") or (part in Experiment.model_fields and key in {"", "columns.text",
            "columns.target", *keys.get(part, ())}), place  # fmt: skip
    for word in other_words.PLACES:
        assert "did you mean" in refused(f"{word}=1"), word


def test_a_budget_without_a_mechanism_is_at_the_record_level():
    assert changed("privacy.epsilon=2").privacy == changed("privacy={name='record_gaussian',epsilon=2}").privacy
    assert changed("privacy.name=none", "privacy.epsilon=2").privacy["name"] == "record_gaussian"
    assert changed("privacy.name=client_gaussian", "privacy.epsilon=2").privacy["name"] == "client_gaussian"
    assert parse(TEXT + "[privacy]\nepsilon = 3", "my.toml").privacy["epsilon"] == 3


def test_a_misspelt_key_in_the_file_is_named_too():
    text = TEXT.replace("local_steps", "lokal_steps")
    assert "my.toml: training: unknown key 'lokal_steps'; did you mean 'local_steps'?" in refused(text=text)


@pytest.mark.parametrize("part", ["data", "partition", "task"])
def test_a_part_without_a_default_must_be_there(part):
    lines, keep, inside = TEXT.splitlines(), [], False
    for line in lines:
        inside = line == f"[{part}]" or (inside and not line.startswith("["))
        keep += [] if inside else [line]
    assert f"my.toml: {part} is missing; it has no default" in refused(text="\n".join(keep))


@pytest.mark.parametrize("part", ["task", "method", "privacy"])
@pytest.mark.parametrize("value", ["{}", "{name=3}"])
def test_a_module_needs_a_name(part, value):
    told = "= {}: state epsilon" if (part, value) == ("privacy", "{}") else "needs a `name`"
    assert f"my.toml: {part} {told}" in refused(f"{part}={value}", text=TEXT)


@pytest.mark.parametrize("value", ["3", "'x'", "[1]"])
@pytest.mark.parametrize("part", ["training", "backbone", "data", "task", "method", "privacy", "compression"])
def test_a_part_that_is_no_table_says_how_it_is_written(part, value):
    said = rf"my\.toml: {part} = .*: a table is expected: write {part} = {{ \w+ = "
    assert re.search(said, refused(f"{part}={value}"))


@pytest.mark.parametrize("text", ["groups = 3", "[groups]\na = 3"])
def test_groups_that_are_no_tables_are_refused(text):
    assert "a table is expected" in refused(text=text)


@pytest.mark.parametrize("text", ["name = ", "[task\nname='x'", "a = 1\na = 2", "just words"])
def test_what_is_no_toml_is_said_to_be_none(text):
    assert refused(text=text).startswith("my.toml is not TOML: ")


@pytest.mark.parametrize("value", ["3", "'local'", "{a=1}"])
def test_baselines_that_are_no_list_of_names_are_refused(value):
    refused(f"baselines={value}")


def test_errors_of_one_part_are_told_together():
    told = refused("training.local_steps=0", "training.batch_size=0")
    assert "training.local_steps = 0" in told
    assert "training.batch_size = 0" in told


@pytest.mark.parametrize(("change", "read_back"), [
    ("training.local_steps=7", lambda e: e.training.local_steps == 7),
    ("training.learning_rate=1e-3", lambda e: e.training.learning_rate == 0.001),
    ("training.local_steps = 7 ", lambda e: e.training.local_steps == 7),
    ("backbone.name=some/model", lambda e: e.backbone.name == "some/model"),
    ("backbone.name='minilm'", lambda e: e.backbone.name == "minilm"),
    ("name=a=b", lambda e: e.name == "a=b"),
    ("baselines=['local','fedavg']", lambda e: e.baselines == ("local", "fedavg")),
    ("data.columns.text=review", lambda e: e.data.columns == {"text": "review"}),
    ("backbone.options={width=8}", lambda e: e.backbone.options == {"width": 8}),
    ("backbone.options.depth=3", lambda e: e.backbone.options == {"width": 16, "depth": 3}),
    ("task.tuned_head=true", lambda e: e.task["tuned_head"] is True),
    ("task.instruction=It is, after all", lambda e: e.task["instruction"] == "It is, after all"),
    ("prompt.text=", lambda e: e.prompt.text == ""),
    ("seed=12", lambda e: e.seed == 12),
])  # fmt: skip
def test_set_reads_toml_and_else_plain_text(change, read_back):
    assert not read_back(changed()), "the test shows nothing: the value is there without the change"
    assert read_back(changed(change))


def test_a_later_change_wins_and_the_others_stay():
    found = changed("seed=1", "training.batch_size=3", "seed=2")
    assert (found.seed, found.training.batch_size, found.training.local_steps) == (2, 3, 2)


def test_another_module_begins_with_its_own_settings():
    one = changed("method.name=ficpd", "method.num_prototypes=9")
    assert one.method == {
        "name": "ficpd",
        "num_prototypes": 9,
        **{k: one.method[k] for k in one.method.keys() - {"name", "num_prototypes"}},
    }
    text = to_toml(one)
    fresh = parse(text, "x", ["method.name=fedprox"]).method
    assert (fresh["name"], fresh["proximal_weight"], "num_prototypes" in fresh) == ("fedprox", 0.01, False)
    assert parse(text, "x", ["method.name=ficpd"]).method["num_prototypes"] == 9


@pytest.mark.parametrize(("before", "change", "part", "kept"), [
    ([], "task.name=ficpd.tasks.classification", "task", {"labels": small.LABELS}),
    (["privacy.epsilon=3"], "privacy.name=shared_gaussian", "privacy", {"epsilon": 3}),
    (["compression.name=subspace", "compression.dimension=8"], "compression.name=none", "compression", {}),
])  # fmt: skip
def test_a_new_module_keeps_the_settings_that_it_has(before, change, part, kept):
    found = dict(getattr(changed(*before, change), part))
    assert found["name"] == change.partition("=")[2]
    assert kept.items() <= found.items()
    assert part != "compression" or "dimension" not in found


def test_a_module_of_ones_own_without_a_dot_says_how_to_name_it():
    assert "A module of your own has a dotted name, such as mylab.topk" in refused("method.name=topk")
    assert "dotted" not in refused("method.name=fedavgg")


@pytest.mark.parametrize("change", ["seed", "=3", ".a=3", "training.=3", "training..batch_size=3", ""])
def test_a_change_that_is_none_is_refused(change):
    assert f"--set {change!r}: expected part.key=value" in refused(change)


def test_a_change_below_a_value_is_refused():
    assert "--set 'seed.x=3': seed is a value, not a part" in refused("seed.x=3")


@pytest.mark.parametrize("changes", [
    [],
    ["method.name=ficpd", "prompt.enters_at=1", "federation.clients_per_round=2", "training.learning_rate=0.5"],
    ["task.instruction='quote \" and \\ and ä'", "prompt.text='two\nlines'", "baselines=['local']"],
    ["privacy.name=none", "engine.chunk_tokens=64", "data.max_records=30"],
])  # fmt: skip
def test_an_experiment_written_and_read_is_the_same(changes):
    changes = [change.replace("\n", " ") for change in changes]
    given = changed(*changes)
    text = to_toml(given)
    again = parse(text, "again.toml")
    assert again == given
    assert to_toml(again) == text


def test_all_is_written_defaults_too():
    text = to_toml(changed())
    for key in ("batch_size", "l2_weight", "max_update_norm", "test_fraction", "min_records", "keep_mb", "tuned_head"):
        assert f"{key} = " in text


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_an_experiment(name):
    found = read(name)
    assert parse(to_toml(found), name) == found
    assert found.name


def test_the_quick_start_is_what_is_run_if_nothing_is_named():
    assert read(None) == read("quickstart")
    assert read(None, ["seed=4"]).seed == 4


def test_an_unknown_recipe_names_the_nearest():
    unknown = r"unknown recipe 'quikstart'; did you mean 'quickstart'\?.*give a \.toml file"
    with pytest.raises(ConfigError, match=unknown):
        read("quikstart")


def test_a_file_that_is_not_there_is_said_not_to_be(tmp_path):
    with pytest.raises(ConfigError, match=r"no recipe file .*mine\.toml\. Those of ficpd: .*quickstart"):
        read(str(tmp_path / "mine.toml"))
    with pytest.raises(ConfigError, match="no recipe file"):
        read(str(tmp_path))


@pytest.mark.parametrize("name", ["notes.csv", "notes.parquet", "notes.csv.gz"])
def test_a_table_in_the_place_of_a_recipe_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"text,target\n\xff")
    said = rf"{name} is a table; expected a recipe.*`ficpd init .*{name}` writes a recipe"
    with pytest.raises(ConfigError, match=said):
        read(str(tmp_path / name))


def test_a_file_is_read_wherever_it_is(tmp_path):
    (tmp_path / "mine.toml").write_text(TEXT, encoding="utf-8")
    assert read(str(tmp_path / "mine.toml"), ["seed=5"]) == changed("seed=5")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        read(str(tmp_path / "mine.toml"))


def test_an_experiment_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        changed().seed = 3
    assert config.Experiment.model_fields.keys() >= {"method", "privacy", "engine"}
