"""Private runs of methods: what each release costs, what a record can move, and the levels that a method has no form for."""

import pytest
import torch

import small
from contracts.test_mechanism import Silent
from ficpd.errors import PrivacyError
from ficpd.federation.client import Client
from ficpd.privacy import clipping, record_gaussian
from ficpd.privacy.clipping import clipped_sum
from ficpd.types import ClientWorkload

DELTA = "privacy.delta=1e-3"
STEPS = {"prompt": 6}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "epsilon", "changes", "releases", "levels"), [
    ("dp_cma_es", 8, ["training.population=6"], {"prompt": 3}, {"global"}),
    ("dp_fpl", 2, [], STEPS, {"personal", "global"}),
    ("dp_zo", 8, [], STEPS, {"global"}),
    ("feddtpt", 2, ["method.clip_norm=0.75"], STEPS, {"global"}),
    ("fedhpl", 2, [], STEPS | {"logits": 3}, {"personal"}),
    ("prompt_dpsgd", 2, ['baselines=["local"]'], STEPS, {"personal"}),
])  # fmt: skip
def test_a_run_at_record_level_keeps_its_budget_and_pays_each_release(
    tmp_path, name, epsilon, changes, releases, levels
):
    result = small.run(tmp_path, name, "privacy.name=record_gaussian", DELTA, f"privacy.epsilon={epsilon}", *changes)
    assert 0.95 * epsilon < result.privacy.epsilon <= epsilon
    assert {line.name: line.releases for line in result.privacy.lines} == releases
    assert result.dropped_updates == 0
    assert result.personalization.keys() == levels
    assert (result.scores.global_prompt is None) == ("global" not in levels)
    assert name != "feddtpt" or result.privacy.clip_norm == 0.75
    assert name != "prompt_dpsgd" or small.library(tmp_path).keys() == {"start"}


NO_FORM = r"fedbpt has no private form: .* use dp_cma_es"
ONE_BY_ONE = "fpl aggregates each client's update"


@pytest.mark.parametrize(("name", "level", "changes", "words"), [
    ("fedbpt", "record", [], NO_FORM),
    ("fedbpt", "local", [], NO_FORM),
    ("feddtpt", "local", [], "record_gaussian"),
    ("feddtpt", "central", [], "record_gaussian"),
    ("fedhpl", "local", [], "record_gaussian"),
    ("fpl", "central", ['method.clusters="signatures"'], ONE_BY_ONE),
    ("fpl", "central", ['method.clusters="none"', 'method.server.kind="extrapolated"'], ONE_BY_ONE),
])  # fmt: skip
def test_a_level_that_a_method_has_no_form_for_is_refused_by_name(tmp_path, name, level, changes, words):
    kind = "record_gaussian" if level == "record" else "client_gaussian"
    placed = [] if level == "record" else [f"privacy.placement={level}", "privacy.clip_norm=0.5"]
    with pytest.raises(PrivacyError, match=words):
        small.run(tmp_path, name, f"privacy.name={kind}", "privacy.epsilon=8", DELTA, *placed, *changes)


CLIP, NUMBER = 0.02, 7


@pytest.fixture(params=[("dp_cma_es", "losses_1K", "population", 9), ("dp_zo", "slopes_SK", "directions", 4)])
def farthest(request, model, monkeypatch):
    """Returns the largest change of what leaves in one step of all `NUMBER` records with one record less."""
    name, array, setting, number = request.param
    training = small.TRAINING.model_copy(update={"local_steps": 1, "batch_size": NUMBER, setting: number, "seed": 3})
    method, records = small.method(name, training), small.records(NUMBER, 4)
    monkeypatch.setattr(Client, "noise_source", lambda *_: Silent())
    config = record_gaussian.Config(noise_multiplier=1.0, clip_norm=CLIP, delta=1e-3)
    mechanism = record_gaussian.build(config, ClientWorkload(NUMBER, 1.0, 1, 1, 1, 1.0, 1))

    def measured() -> float:
        found = []
        for left_out in (None, *range(NUMBER)):
            client = small.clients(model, method, 1, mechanism=mechanism)["site-0"]
            client.train = [record for place, record in enumerate(records) if place != left_out]
            sent = small.update(method, client, small.first_state(method, {"site-0": client}), model)
            found.append(sent.arrays[array].double() * len(client.train))
        return max(float((found[0] - other).norm()) for other in found[1:])

    return measured


def test_one_record_moves_what_leaves_by_at_most_the_clip_norm_over_all_candidates_and_directions(farthest):
    assert 0.9 * CLIP < farthest() <= CLIP * (1 + 1e-4)


def test_clipping_each_number_by_itself_would_not_hold(farthest, monkeypatch):
    def each(rows_BN, clip_norm):
        return torch.cat([clipped_sum(rows_BN[:, k : k + 1], clip_norm) for k in range(rows_BN.shape[1])])

    monkeypatch.setattr(clipping, "clipped_sum", each)
    assert farthest() > 1.2 * CLIP
