"""A comparison's file: the cells that it asks for, what they have in common, and what is wrong with it."""

from pathlib import Path

import pytest

import small
from ficpd.errors import ConfigError
from ficpd.experiments.comparison import grid as plans
from ficpd.experiments.comparison.grid import Grid, expand, read_plan
from ficpd.experiments.comparison.overrides import merge, parsed_sweeps
from ficpd.experiments.config import recipes

AXES = """
[methods.ficpd]
method.num_prototypes = 2
[methods.fedavg]
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    small.table(tmp_path / "records.csv")
    (tmp_path / "small.toml").write_text(small.toml(tmp_path / "records.csv"))
    return tmp_path


def plan(folder: Path, axes: str = AXES, *ablate: str, head: str = "seeds = [0, 1]") -> Grid:
    return expand(f'name = "test"\nrecipe = "small.toml"\n{head}\n{axes}', "test.toml", ablate, folder)


def refused(folder: Path, axes: str = AXES, *ablate: str, head: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        plan(folder, axes, *ablate, head=head)
    return str(caught.value)


def values(found: Grid, method: str, path: str) -> list:
    part, key = path.split(".")

    def of(cell) -> object:
        tree = getattr(cell.experiment, part)
        return tree.get(key) if isinstance(tree, dict) else getattr(tree, key)

    return [of(cell) for cell in found.cells if cell.method == method]


def test_the_grid_is_the_product_and_has_the_lines(folder):
    budgets = '[budgets.a]\nrounds = 2\n[budgets.b]\nrounds = 4\n[tasks.x]\n[tasks.y]\ntask.instruction = "it is"\n'
    found = plan(folder, AXES + budgets)
    assert list(found.methods) == ["zero_shot", "local", "centralized", "ficpd", "fedavg"]
    assert len(found.cells) == 5 * 2 * 2 * 2
    assert len({(c.method, c.task, c.budget, c.seed) for c in found.cells}) == len(found.cells)
    assert values(found, "fedavg", "federation.num_rounds") == [2, 2, 4, 4] * 2
    assert values(found, "ficpd", "method.num_prototypes") == [2] * 8
    assert {c.experiment.task["instruction"] for c in found.cells if c.task == "y"} == {"it is"}


def test_all_methods_of_a_condition_share_all_but_what_a_method_may_change(folder):
    axes = AXES + '[methods.prox]\nmethod.name = "fedprox"\ntraining.batch_size = 8\ncompression.name = "none"\n'
    found = plan(folder, axes + "[budgets.a]\nepsilon = 2\nrounds = 3\n")
    for seed in (0, 1):
        cells = [c for c in found.cells if c.seed == seed and c.method not in plans.REFERENCE_METHODS]
        for part in ("backbone", "task", "data", "partition", "groups", "seed", "federation", "privacy"):
            assert len({repr(getattr(c.experiment, part)) for c in cells}) == 1, part
        assert len({c.ground for c in found.cells if c.seed == seed}) == 1
    assert len({c.ground for c in found.cells}) == 2


def test_a_cell_that_asks_for_the_same_run_shares_it(folder):
    """Nothing leaves `local`, so no ε changes it; nothing at all changes `zero_shot`; bytes only cut a curve."""
    budgets = "[budgets.a]\nepsilon = 1\n[budgets.b]\nepsilon = 2\n[budgets.c]\nepsilon = 2\nbytes = 1000\n"
    found = plan(folder, AXES + budgets)
    runs = {label: {c.hash for c in found.cells if c.method == label and c.seed == 0} for label in found.methods}
    assert {label: len(hashes) for label, hashes in runs.items()} == {
        "zero_shot": 1, "local": 1, "centralized": 1, "ficpd": 2, "fedavg": 2,
    }  # fmt: skip
    assert {c.experiment.privacy["name"] for c in found.cells if c.method == "centralized"} == {"none"}
    limits = {c.method: c.limits for c in found.cells if c.budget == "c"}
    assert limits["fedavg"] == {"bytes": 1000}
    assert limits["centralized"] == {}


def test_sweeps_of_a_method_make_methods_and_others_make_settings(folder):
    found = plan(folder, AXES, "method.num_prototypes=2,3", "training.local_steps=1,2")
    assert list(found.methods)[3:] == ["ficpd num_prototypes=2", "ficpd num_prototypes=3", "fedavg"]
    assert values(found, "ficpd num_prototypes=3", "method.num_prototypes") == [3] * 4
    assert values(found, "fedavg", "training.local_steps") == [1, 1, 2, 2]
    assert found.reference == "ficpd num_prototypes=2"
    assert {tuple(c.sweep) for c in found.cells} == {("training.local_steps",)}


def test_a_swept_epsilon_brings_a_mechanism_and_wins_over_the_file(folder):
    free = '[methods.free]\nmethod.name = "fedavg"\nprivate = false\n'
    found = plan(folder, AXES + free, "privacy.epsilon=1,2.5,inf")
    assert values(found, "fedavg", "privacy.name")[::2] == ["record_gaussian", "record_gaussian", "none"]
    assert values(found, "fedavg", "privacy.epsilon")[::2] == [1, 2.5, None]
    assert values(found, "free", "privacy.name") == ["none"] * 6


def test_a_task_may_be_another_recipe_and_a_partition_another_kind(folder):
    other = small.toml(folder / "records.csv", rounds=5).replace('name = "small"', 'name = "other"')
    (folder / "other.toml").write_text(other)
    axes = '[tasks.here]\n[tasks.there]\nrecipe = "other.toml"\n[partitions.sites]\n[partitions.iid]\n'
    found = plan(folder, AXES + axes + 'partition = { kind = "iid", num_clients = 4 }\n')
    assert {(c.task, c.experiment.name, c.experiment.federation.num_rounds) for c in found.cells if c.method == "local"} == {
        ("here", "small", 3), ("there", "other", 5),
    }  # fmt: skip
    kinds = {(c.partition, c.experiment.partition.kind, c.experiment.partition.num_clients) for c in found.cells}
    assert kinds == {("sites", "column", None), ("iid", "iid", 4)}


def test_a_partition_is_that_of_every_group(folder):
    text = small.toml(folder / "records.csv")
    start = text.index("[task]")
    ground, rest = text[start : text.index("[method]")], text[:start] + text[text.index("[method]") :]
    grounds = (ground.replace("[", f"[groups.{n}.", 1).replace("\n[", f"\n[groups.{n}.") for n in ("a", "b"))
    groups = "".join(grounds)
    (folder / "small.toml").write_text(rest + groups)
    found = plan(folder, AXES + '[partitions.iid]\npartition = { kind = "iid", num_clients = 2 }\n')
    assert {party.partition.kind for c in found.cells for party in c.experiment.all_groups.values()} == {"iid"}


def test_a_run_is_named_by_what_it_asks_for(folder):
    new = '[methods.new]\nmethod.name = "fedprox"\n'
    before, after = plan(folder), plan(folder, AXES + new, head="seeds = [0, 1, 2]")
    hashes = {c.hash for c in before.cells}
    assert hashes < {c.hash for c in after.cells}, "a larger grid asks for the old runs too"
    changed = plan(folder, AXES, head='seeds = [0, 1]\nset = ["training.local_steps=7"]')
    assert not {c.hash for c in changed.cells if c.method != "zero_shot"} & hashes
    names = {c.readable for c in before.cells}
    assert len(names) == 10
    assert all(name.replace("-", "").replace("_", "").isalnum() for name in names)


def test_every_comparison_that_comes_with_the_package_is_one(monkeypatch):
    assert recipes("compare")
    for name in recipes("compare"):
        found = read_plan(name)
        assert found.spec.name == name
        assert len(found.cells) > 5


@pytest.mark.parametrize(("sweep", "words"), [
    ("privacy.epsilon", "expected part.key=value,value"),
    ("privacy.epsilon=", "expected part.key=value,value"),
    ("epsilon=1,2", "expected part.key=value,value"),
    ("privacy..epsilon=1", "expected part.key=value,value"),
    ("privcy.epsilon=1,2", "unknown part 'privcy'; did you mean 'privacy'?"),
    ("seed.x=1,2", "unknown part 'seed'"),
    ("method.name=fedavg,fpl", "methods are entries of the file"),
    ("training.optimizer=adam,,sgd", "a value is empty"),
    ("training.local_steps=1,2,1", "a value is given twice"),
    ("method.num_prototype=1,2",
     "no method here has it: unknown setting 'num_prototype'; did you mean 'num_prototypes'?"),
    ("training.local_step=1,2", "unknown key 'local_step'; did you mean 'local_steps'?"),
    ("training.local_steps=1,none", "training.local_steps = 'none'"),
    ("training.local_steps.x=1", "local_steps"),
])  # fmt: skip
def test_a_wrong_sweep_says_what_is_expected(folder, sweep, words):
    assert words in refused(folder, AXES, sweep)


def test_a_sweep_is_read_as_set_reads():
    assert parsed_sweeps(['method.b=1,2.5,true,"x, y"']) == {"method.b": [1, 2.5, True, "x, y"]}
    assert parsed_sweeps(["method.b=auto, 3"]) == {"method.b": ["auto", 3]}
    assert parsed_sweeps(['method.by=["a"],["a","b"]']) == {"method.by": [["a"], ["a", "b"]]}
    with pytest.raises(ConfigError, match="swept twice"):
        parsed_sweeps(["method.b=1", "method.b=2"])


@pytest.mark.parametrize(("axes", "words"), [
    ("", "methods is missing"),
    ("[methods.local]", "names only the baselines that are always added"),
    ("methods = 3", "methods is a table of entries"),
    ("[methods]\nfedavg = 3", "methods.fedavg = 3: expected a piece of a recipe"),
    ("[methods.fedavgg]", "unknown method 'fedavgg'; did you mean 'fedavg'?"),
    ("[methods.fedavg]\nfederation.num_rounds = 3", "methods.fedavg: unknown key 'federation'"),
    ("[methods.fedavg]\ndata.max_records = 3", "methods.fedavg: unknown key 'data'"),
    ("[methods.fedavg]\nprivacy.epsilon = 3", "methods.fedavg: unknown key 'privacy'"),
    ("[methods.fedavg]\ntrainin.batch_size = 3", "unknown key 'trainin'; did you mean 'training'?"),
    ("[methods.fedavg]\ntraining.batch_sise = 3", "unknown key 'batch_sise'; did you mean 'batch_size'?"),
    ("[methods.fedavg]\ntraining = 3", "methods.fedavg.training = 3: "),
    ("[methods.fedavg]\nprivate = 'no'", "methods.fedavg.private = 'no': "),
    ("[methods.local]\nmethod.name = 'fedavg'\n[methods.fedavg]", "methods.local is a line that is always there"),
    ("[methods.centralized]\nprivate = true\n[methods.fedavg]", "give a private one another label"),
    ("[methods.fedavg]\n[budgets.a]\nepsilon = 0", "budgets.a.epsilon = 0: Input should be greater than 0"),
    ("[methods.fedavg]\n[budgets.a]\nrounds = 2.5", "budgets.a.rounds = 2.5: Input should be a valid integer"),
    ("[methods.fedavg]\n[budgets.a]\nbytes = inf", "budgets.a.bytes = inf: Input should be a finite number"),
    ("[methods.fedavg]\n[budgets.a]\nbyte = 3", "budgets.a: unknown key 'byte'; did you mean 'bytes'?"),
    ("[methods.fedavg]\n[tasks.a]\nseed = 3", "tasks.a: unknown key 'seed'"),
    ("[methods.fedavg]\n[tasks.a]\nrecipe = 'nowhere.toml'", "no recipe file"),
    ("[methods.fedavg]\n[partitions.a]\npartition.kind = 'iid'", "partition"),
    ("[methods.' ']", "a label is a few printable characters"),
])  # fmt: skip
def test_a_mistake_in_an_axis_is_named(folder, axes, words):
    assert words in refused(folder, axes)


@pytest.mark.parametrize(("head", "words"), [
    ("sede = [1]", "unknown key 'sede'; did you mean 'seeds'?"),
    ("seeds = []", "test.toml: seeds = []"),
    ("seeds = [1, 1]", "a seed is given twice"),
    ("targets = [1.5]", "test.toml: targets.0 = 1.5"),
    ("figure = 'best'", "test.toml: figure = 'best'"),
    ("reference = 'fedavgg'", "unknown reference 'fedavgg'; did you mean 'fedavg'?"),
    ("set = ['training.local_step=1']", "unknown key 'local_step'; did you mean 'local_steps'?"),
    ("seeds = [", "test.toml is not TOML"),
])  # fmt: skip
def test_a_mistake_in_the_head_is_named(folder, head, words):
    assert words in refused(folder, head=head)


def test_a_name_that_is_not_there_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown comparison 'quik'; did you mean 'quick'\?"):
        read_plan("quik")
    with pytest.raises(ConfigError, match=r"no comparison file nowhere\.toml\. Those of ficpd: quick"):
        read_plan("nowhere.toml")


def test_a_piece_of_another_name_takes_the_place_of_the_part():
    base = {"privacy": {"name": "none"}, "partition": {"kind": "column", "column": "site"}}
    over = merge(base, {"privacy": {"name": "record_gaussian", "epsilon": 1.0}, "partition": {"min_records": 2}})
    partition = {"kind": "column", "column": "site", "min_records": 2}
    assert over == {"privacy": {"name": "record_gaussian", "epsilon": 1.0}, "partition": partition}
    assert base["partition"] == {"kind": "column", "column": "site"}


def test_a_comparison_is_a_simulation(folder):
    assert 'engine.name = "flower" is for real sites' in refused(folder, head="set = ['engine.name=flower']")


def test_the_reference_is_the_exact_label_before_a_variant(folder):
    axes = '[methods."ficpd free"]\nmethod.name = "ficpd"\nprivate = false\n[methods.ficpd]\n'
    assert plan(folder, axes, head='reference = "ficpd"').reference == "ficpd"
    assert plan(folder, axes).reference == "ficpd free"
    assert plan(folder, axes, head='reference = "centralized"').reference == "centralized"
