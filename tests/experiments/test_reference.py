"""Every setting is described, and the schema takes what the package takes."""

import json
import tomllib

import jsonschema
import pytest

from ficpd.experiments import reference
from ficpd.experiments.config import read, read_recipe, to_toml
from ficpd.experiments.facts import recipes

SCHEMA = reference.recipe_schema()
CHECK = jsonschema.Draft202012Validator(SCHEMA)
TREE = tomllib.loads(read_recipe("quickstart")[0])


def plain(tree):
    """The tree as a JSON document, whose lists are lists."""
    return json.loads(json.dumps(tree))


def test_the_schema_is_one():
    CHECK.check_schema(SCHEMA)


@pytest.mark.parametrize("name", recipes())
def test_the_schema_takes_a_recipe_with_and_without_its_defaults(name):
    for text in (read_recipe(name)[0], to_toml(read(name))):
        assert list(CHECK.iter_errors(plain(tomllib.loads(text)))) == []


@pytest.mark.parametrize(("part", "value"), [
    ("promt", {}), ("seed", "one"), ("prompt", {"num_tokens": 0}), ("prompt", {"tokens": 3}),
    ("task", {"name": "tasks"}),
    ("method", {"name": "fedavg", "num_prototypes": 3}), ("privacy", {"epsilon": -1.0}), ("engine", {"name": 3}),
    ("groups", {"a": {"task": {"name": "classification"}}}),
])  # fmt: skip
def test_the_schema_refuses_what_the_package_refuses(part, value):
    assert list(CHECK.iter_errors(plain({**TREE, part: value})))


def test_the_schema_takes_a_record_level_budget_without_a_name_and_a_dotted_name():
    tree = {**TREE, "privacy": {"epsilon": 2}, "method": {"name": "mylab.mine", "x": 1}}
    assert list(CHECK.iter_errors(plain(tree))) == []


def test_every_setting_has_a_meaning():
    lines = [line for line in reference.settings_page().splitlines() if line.startswith("| `")]
    assert len(lines) > 150
    assert [line for line in lines if line.endswith("|  |")] == []
