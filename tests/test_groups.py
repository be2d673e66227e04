"""Federations of several tasks: one prompt shape, many label sets; who shares a prototype with whom."""

import json
from pathlib import Path

import pytest
import torch

import small
from ficpd.errors import ConfigError, PrivacyError
from ficpd.experiments.build import build_context
from ficpd.experiments.config import parse, to_toml
from ficpd.experiments.runner import run as run_experiment
from ficpd.federation import privacy_plan
from ficpd.library.library import PromptLibrary
from ficpd.types import ClientWorkload

OPPOSED = {"up": "bad dull", "down": "good fine"}
"""The labels of the second task: the same words, meant the other way round."""


def toml(folder: Path, method: str = "ficpd", rounds: int = 3, more: str = "") -> str:
    """Two tasks of three clients each that pull a prompt in opposite directions."""
    small.table(folder / "a.csv", 90)
    swapped = (folder / "a.csv").read_text().replace(",good,", ",up,").replace(",bad,", ",down,")
    (folder / "b.csv").write_text(swapped)
    groups = [
        f"""
[groups.{name}]
task = {{ name = "classification", instruction = "it was", labels = {labels} }}
data = {{ source = {json.dumps(str(folder / file))}, keep = ["site"] }}
partition = {{ kind = "column", column = "site" }}
"""
        for name, file, labels in (
            ("plain", "a.csv", '{ good = "good fine", bad = "bad dull" }'),
            ("opposed", "b.csv", '{ up = "bad dull", down = "good fine" }'),
        )
    ]
    return f"""
baselines = []
backbone = {{ name = "tiny", attention = "eager", dtype = "float32", options = {{ width = 16 }} }}
prompt = {{ num_tokens = 3 }}
training = {{ local_steps = 6, batch_size = 16, learning_rate = 0.3 }}
federation = {{ num_rounds = {rounds} }}
method = {{ name = "{method}"{more} }}
""" + "".join(groups)


def run(folder: Path, *changes: str, **kinds) -> dict:
    return run_experiment(parse(toml(folder, **kinds), "groups.toml", changes), folder / "run")


def test_every_client_has_its_own_groups_task(tmp_path):
    context = build_context(parse(toml(tmp_path), "x"))
    assert sorted(context.shards) == [f"{g}.site-{i}" for g in ("opposed", "plain") for i in range(3)]
    assert context.shards["plain.site-0"].metadata == {"site": "site-0", "group": "plain"}
    clients = context.clients()
    assert clients["plain.site-1"].task is context.tasks["plain"]
    assert clients["opposed.site-1"].task.label_space == ["up", "down"]
    pooled = context.clients(pooled=True)
    groups = {g: [c for n, c in clients.items() if n.startswith(g)] for g in ("plain", "opposed")}
    shares = {f"{g}.everyone": sum(len(c.train) for c in own) for g, own in groups.items()}
    assert {name: len(c.train) for name, c in pooled.items()} == shares
    with pytest.raises(ConfigError, match="several tasks"):
        _ = context.task


def test_prototypes_part_what_opposes_and_beat_one_prompt_for_all(tmp_path):
    (tmp_path / "f").mkdir()
    found = run(tmp_path, "method.num_prototypes=2", rounds=8)
    naive = run(tmp_path / "f", method="fedavg", rounds=8)
    assert found.clusters.adjusted_rand["group"] == 1.0
    assert found.clusters.number == 2
    own, all_alike = (r.scores.per_client_mean["accuracy"] for r in (found, naive))
    assert own > all_alike + 0.05
    page = small.page(tmp_path)
    assert "\nopposed.site-0, opposed.site-1, opposed.site-2\n" in page
    assert "group 1.00" in page


def test_the_card_says_how_many_prototypes_there_are_and_how_they_were_made(tmp_path):
    (tmp_path / "public.txt").write_text("\n".join(r.fields["text"] for r in small.records(60, 77)) + "\n")
    how = ("distillation.how=reptile", f"distillation.texts={tmp_path / 'public.txt'}", "distillation.steps=2")
    found = run(tmp_path, "method.num_prototypes=auto", "method.space=delta", *how, rounds=2)
    library = PromptLibrary.load(tmp_path / "run")
    assert library.card["prototypes"] == found.clusters.number == len(library.prompts) - 2
    assert library.card["settings"]["num_prototypes"] == "auto"
    assert library.card["settings"]["space"] == "delta"
    assert "shrinkage" in library.card["settings"]
    distilled = library.card["distilled"]
    assert (distilled["how"], distilled["writer"]) == ("reptile", "public.txt")
    page = (tmp_path / "run" / "library" / "README.md").read_text()
    assert f"{found.clusters.number} prototypes" in page
    assert "distilled (reptile) on examples by public.txt" in page
    (tmp_path / "f").mkdir()
    run(tmp_path / "f", method="fedavg", rounds=1)
    assert "prototypes" not in PromptLibrary.load(tmp_path / "f" / "run").card


def test_the_library_knows_every_task_and_whose_each_prototype_is(tmp_path):
    run(tmp_path, "method.num_prototypes=2", rounds=2)
    library = PromptLibrary.load(tmp_path / "run")
    assert list(library.card["tasks"]) == ["plain", "opposed"]
    assert library.card["tasks"]["opposed"]["labels"] == OPPOSED
    assert set(library.prompts) == {"global", "prototype-0", "prototype-1"}


@pytest.mark.parametrize("method", ["fedavg", "local", "linear_probe", "centralized", "zero_shot"])
def test_every_method_runs_and_scores_each_task_by_its_own_labels(tmp_path, method):
    found = run(tmp_path, method=method, rounds=2)
    assert len(found.scores.per_client) == 6
    assert 0.0 <= found.scores.per_client_mean["accuracy"] <= 1.0
    if method == "zero_shot":
        assert found.clusters is None


def test_the_oracle_goes_by_the_public_group(tmp_path):
    found = run(tmp_path, more=', space = "metadata"', rounds=2)
    assert found.clusters.adjusted_rand["group"] == 1.0
    by_site = run_experiment(parse(toml(tmp_path, more=', space = "metadata", by = "site"'), "x"), tmp_path / "by site")
    assert by_site.clusters.adjusted_rand["site"] == 1.0


PRIVATE = ("privacy.name=record_gaussian", "privacy.noise_multiplier=1.0", "privacy.delta=1e-3")


def test_each_tasks_records_are_clipped_at_its_own_norm_found_without_a_record(tmp_path):
    """Texts for the second task's answers that lie close to one another make its gradients short."""
    labels = ('up = "bad dull", down = "good fine"', 'up = "good fine", down = "good"')
    given = toml(tmp_path, "fedavg", 1).replace(*labels)
    built = build_context(parse(given, "groups.toml", PRIVATE))
    norms = built.experiment.privacy["clip_norms"]
    assert set(norms) == {"plain", "opposed"}
    assert norms["plain"] > 1.5 * norms["opposed"] > 0
    again = build_context(parse(to_toml(built.experiment), "resolved.toml"))
    assert again.experiment.privacy["clip_norms"] == norms
    part = {**built.experiment.privacy}
    workload = ClientWorkload(40, 0.1, 2, 3, 4, 1.0, 3)
    for name in built.shards_for(pooled=True) | built.shards:
        mechanism = privacy_plan.build_mechanism(part, name, workload)
        assert mechanism.guarantee()["clip_norm"] == norms[built.group_of.get(name, name.partition(".")[0])]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ficpd", "centralized"])
def test_a_private_federation_of_groups_states_the_norm_of_who_spent_most(tmp_path, method):
    result = run(tmp_path, *PRIVATE, method=method, rounds=1)
    norms = parse((tmp_path / "run" / "resolved.toml").read_text(), "x").privacy["clip_norms"]
    assert result.privacy.clip_norm == norms[result.privacy.site_that_spent_most.partition(".")[0]]


def test_a_group_without_a_clip_norm_is_named(tmp_path):
    with pytest.raises(PrivacyError, match=r"clip_norms has none for 'opposed'"):
        run(tmp_path, *PRIVATE, "privacy.clip_norms={plain = 0.1}")


def test_groups_survive_being_written_down(tmp_path):
    experiment = parse(toml(tmp_path), "x")
    assert parse(to_toml(experiment), "y") == experiment


def test_what_cannot_be_a_federation_of_groups_is_said(tmp_path):
    text = toml(tmp_path)
    with pytest.raises(ConfigError, match="'task' stands outside the groups"):
        parse(text + '\n[task]\nname = "classification"\nlabels = { a = "a", b = "b" }\n', "x")
    bare = '[groups.a]\ntask = { name = "classification", labels = { a = "a", b = "b" } }\ndata = { source = "x" }'
    with pytest.raises(ConfigError, match="partition is missing"):
        parse(bare, "x")
    with pytest.raises(ConfigError, match="task is missing; it has no default"):
        parse('[data]\nsource = "ratings"\n', "x")
    with pytest.raises(ConfigError, match="a head fits one label set, and this federation has 2 tasks"):
        build_context(parse(text, "x", ["groups.plain.task.tuned_head=true"]))


def test_a_run_goes_on_from_a_saved_prompt(tmp_path):
    small.run(tmp_path, "fedavg", rounds=3)
    kept = PromptLibrary.load(tmp_path / "run").prompts["global"]
    changes = ("prompt.init=library", f"prompt.library={tmp_path / 'run'}")
    context = build_context(small.experiment(tmp_path, "fedavg", *changes))
    assert torch.equal(context.start.vectors_PD, kept.vectors_PD)
    assert (context.start.enters_at, context.experiment.prompt.num_tokens) == (kept.enters_at, 3)


def test_a_start_that_does_not_fit_is_refused(tmp_path):
    small.run(tmp_path, "fedavg", rounds=1)
    given = f"prompt.library={tmp_path / 'run'}"
    with pytest.raises(ConfigError, match="go together"):
        small.experiment(tmp_path, "fedavg", given)
    with pytest.raises(ConfigError, match="did you mean 'global'"):
        build_context(small.experiment(tmp_path, "fedavg", given, "prompt.init=library", "prompt.of=globl"))
    with pytest.raises(ConfigError, match=r"enters at 1\. Leave it out"):
        build_context(small.experiment(tmp_path, "fedavg", given, "prompt.init=library", "prompt.enters_at=0"))
