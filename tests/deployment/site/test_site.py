"""A site guards its own: what it answers, refuses, stores and survives."""

import json
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import grids
import small
from ficpd.deployment import coordinator, run_spec
from ficpd.deployment.run_spec import RunSpec
from ficpd.deployment.site.load import build_site
from ficpd.deployment.site.site import LEDGER, Site, SpecMissingError
from ficpd.errors import (
    BackboneError,
    BudgetError,
    CodecError,
    ConfigError,
    DataError,
    LedgerError,
    PolicyError,
    PrivacyError,
    RunError,
    SiteError,
)
from ficpd.experiments.build import ExperimentContext, build_context
from ficpd.experiments.results import RunResult
from ficpd.experiments.runner import run
from ficpd.experiments.setup import build_method, build_schedule
from ficpd.federation import codec
from ficpd.federation.codec import SiteRequest
from ficpd.federation.rounds import Round
from ficpd.library.library import PromptLibrary
from ficpd.methods.fedavg import FedAvg
from ficpd.privacy.noise import SecureNoise
from site_of import NOISED, Nobody, begun, context, recipe, site, train

pytest.importorskip("flwr")
pytestmark = grids.OPEN_SOCKETS


def engine(found: dict[str, Site], **options: Any) -> Any:
    from ficpd.deployment.flower_engine import Config, Flower

    grid = grids.Loopback({place: one.config.socket for place, one in enumerate(found.values(), 1)})
    config = Config.model_validate({"poll_seconds": 0.01, "wait_seconds": 5, "sites": list(found), **options})
    return Flower(config, grid, "")  # type: ignore[arg-type]


def served(one: ExperimentContext, found: dict[str, Site], out: Path, say=lambda line: None, resume=False) -> RunResult:
    return coordinator.run_coordinator(recipe(one), "small.toml", out, engine(found), resume=resume, say=say)


SUMMED = (
    'privacy.name="client_gaussian"', 'privacy.placement="central"', "privacy.epsilon=8.0", "privacy.delta=1e-3",
    "privacy.clip_norm=0.5",
)  # fmt: skip
FARTHER = 'method.server.kind="extrapolated"'
PLAIN, PRIVATE = (), (*NOISED, 'compression.name="subspace"', "compression.dimension=8")
PRIVATE_METHODS = ("fedavg", "ficpd", "fpl", "fedhpl", "prompt_dpsgd", "dp_fpl", "dp_zo", "dp_cma_es")
WITH_PRIORS = (*NOISED, "privacy.statistics={ labels = 0.1 }", "method.label_prior=true")


@pytest.mark.parametrize(("method", "changes", "why"), [
    ("fedbpt", NOISED, "no private form"),
    ("fpl", (*SUMMED, 'method.clusters="none"', FARTHER), "aggregates each client's update"),
    ("zero_shot", (), "for simulations"),
    ("centralized", (), "for simulations"),
])  # fmt: skip
def test_sites_are_not_waited_for_by_what_they_could_not_do(tmp_path, method, changes, why):
    context = build_context(small.experiment(tmp_path, method, *changes))
    with pytest.raises((PrivacyError, ConfigError), match=why):
        coordinator.run_coordinator(recipe(context), "small.toml", tmp_path / "served", Nobody(), say=lambda line: None)  # type: ignore[arg-type]
    assert not (tmp_path / "served" / "resolved.toml").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "changes"), [
    *product(PRIVATE_METHODS, (PLAIN, PRIVATE)),
    *product(("local", "fedbpt"), (PLAIN,)),
    *product(("feddtpt", "fedlora"), (PLAIN, NOISED)),
    *product(("ficpd", "fpl"), (("method.label_prior=true",), WITH_PRIORS)),
])  # fmt: skip
def test_sites_leave_the_same_library_as_a_simulation(tmp_path, method, changes):
    experiment = small.experiment(tmp_path, method, *changes)
    run(experiment, tmp_path / "run")
    expected = small.library(tmp_path)
    context = build_context(experiment)
    with grids.sites(context, methods=(method,)) as found:
        result = served(context, found, tmp_path / "served")
        scores = {name: next(iter(one.status()["runs"].values()))["scores"]["personal"] for name, one in found.items()}
    left = PromptLibrary.load(tmp_path / "served").candidates()
    assert left.keys() == expected.keys()
    for name, prompt in left.items():
        assert small.close(prompt.vectors_PD, expected[name], 1e-5)
    assert result.num_rounds == 3
    assert result.dropped_updates == 0
    simulated = RunResult.load(tmp_path / "run")
    seen, known = ({n: of["accuracy"] for n, of in found.items()} for found in (scores, simulated.scores.per_client))
    assert seen == known, "each site's own view of how it is served"
    known = simulated.bytes
    assert (result.bytes.up_total, result.bytes.down_total) == (known.up_total, known.down_total)


@pytest.mark.slow
@pytest.mark.parametrize("refused", ["by policy", "in the assignment"])
def test_run_coordinator_of_a_refused_first_round_saves_no_library_and_can_resume(tmp_path, monkeypatch, refused):
    one = context(tmp_path, "fedavg")

    def coordinate(found, resume):
        return coordinator.run_coordinator(
            recipe(one), "small.toml", tmp_path / "served", engine(found), resume, say=lambda line: None
        )

    def bad(self, client, assignment):
        raise CodecError("no such fact")

    with (
        monkeypatch.context() as broken,
        grids.sites(one, methods=("fpl" if refused == "by policy" else "fedavg",)) as found,
    ):
        if refused != "by policy":
            broken.setattr(FedAvg, "local_update", bad)
        with pytest.raises(RunError, match=r"methods are 'fpl'|site-0: .*No library was saved"):
            coordinate(found, False)
    assert not (tmp_path / "served" / "library").exists()
    assert not (tmp_path / "served" / "result.json").exists()
    with grids.sites(one, methods=("fedavg",)) as found:
        result = coordinate(found, True)
    assert (result.num_rounds, result.dropped_updates) == (3, 0)


@pytest.mark.parametrize(
    "reason", ["no reply", "site-0 is not connected", "Flower: code 3", "the round is void: 2 left"]
)
def test_after_round_without_a_sites_error_goes_on(reason):
    clients = coordinator.Sites(None, ("", ""), print)  # type: ignore[arg-type]
    run = SimpleNamespace(method=SimpleNamespace(name="fedavg"))
    lost = Round(1, 2, 0, {"site-0": reason, "site-1": reason}, 0, 0, 0.0, 0.0)
    clients.after_round(run, lost)
    with pytest.raises(RunError, match="site-0: CodecError: no"):
        clients.after_round(run, replace(lost, dropped=dict.fromkeys(lost.dropped, "CodecError: no")))
    clients.after_round(run, replace(lost, round=2, dropped=dict.fromkeys(lost.dropped, "CodecError: no")))


@pytest.mark.parametrize("simulated", [True, False])
def test_a_coordinators_report_says_first_whose_noise_somebody_knows(tmp_path, simulated):
    one, said = context(tmp_path, "fedavg", *NOISED), list[str]()
    with grids.sites(one, simulated=simulated) as found:
        result = served(one, found, tmp_path / "served", said.append)
    page = (tmp_path / "served" / "report.html").read_text()
    assert (result.privacy.rehearsed == list(one.shards)) == simulated
    met = [line for line in said if "waiting for sites" not in line and "is connected" not in line]
    assert met[0].startswith("REHEARSAL") == simulated
    assert ("REHEARSAL" in page) == simulated
    if simulated:
        assert re.search(r"<h1[^>]*>\s*REHEARSAL", page), "the page's headline"


def test_the_same_order_is_answered_with_the_same_bytes_and_costs_nothing(noised, tmp_path, opened):
    own, (orders, said) = opened(noised, "site-0", tmp_path, simulated=False), begun(noised)
    first = own.handle(train(orders[0], said))
    spent = own.status()["epsilon"]["spent"]
    assert spent > 0
    assert own.handle(train(orders[0])) == first
    own.close()
    again = opened(noised, "site-0", tmp_path, simulated=False)  # after a restart, without the terms
    assert again.handle(train(orders[0])) == first
    assert again.status()["epsilon"]["spent"] == spent
    second = again.handle(train(orders[1]))
    assert second != first
    assert again.status()["epsilon"]["spent"] > spent
    with pytest.raises(PrivacyError, match="round 1 of fedavg after round 2"):  # out of order: over, and not paid again
        again.handle(train(orders[0]))


def test_noise_of_a_real_site_is_the_operating_systems_whatever_the_recipe_says(noised, tmp_path):
    orders, said = begun(noised)
    bodies = []
    for place in range(2):
        own = site(noised, "site-0", tmp_path / str(place), simulated=False)
        bodies.append(own.handle(train(orders[0], said)))
        (one,) = own.runs.values()
        assert isinstance(one.client.noise_source("fedavg", 1), SecureNoise)
        own.close()
    assert bodies[0] != bodies[1]
    seeds = {(tmp_path / str(place) / "site-0" / "seed").read_text() for place in range(2)}
    assert len(seeds) == 2


@pytest.mark.slow
def test_noise_on_a_sum_of_real_sites_does_not_come_from_the_seed_that_they_all_have(tmp_path):
    one = context(tmp_path, "fedavg", *SUMMED)
    assert one.experiment.privacy.get("noise", "simulated") == "simulated"
    left = []
    for place in range(2):
        with grids.sites(one, mechanisms=["client_gaussian:central"]) as found:
            folder = tmp_path / f"served{place}"
            served(one, found, folder)
        left.append(PromptLibrary.load(folder).prompts["global"].vectors_PD)
    assert not torch.equal(*left)
    assert RunResult.load(folder).privacy.noise == "cryptographic"


def test_a_run_with_noise_at_the_server_is_paid_by_its_sites_too(tmp_path, opened):
    one = context(tmp_path, "fedavg", *SUMMED)
    orders, said = begun(one)
    policy: dict[str, Any] = {"mechanisms": ["client_gaussian:central"], "epsilon": 10.0}
    own = opened(one, "site-0", tmp_path, **policy)
    own.handle(train(orders[0], said))
    spent = own.status()["epsilon"]["spent"]
    assert 7.0 < spent <= 8.0, "all that the run plans"
    own.close()
    own = opened(one, "site-0", tmp_path, **policy)
    own.handle(train(orders[1]))
    assert own.status()["epsilon"]["spent"] == spent
    with pytest.raises(BudgetError, match="on other runs"):
        own.handle(train(orders[0], said, run="b" * 32))
    assert own.status()["epsilon"]["spent"] == spent


def test_a_start_that_no_run_has_is_refused_before_a_record_is_touched(noised, tmp_path, opened):
    """Whoever chose how many rows are a readout would choose how long a text may be before it fails."""
    own, (orders, said) = opened(noised, "site-0", tmp_path), begun(noised)
    found = run_spec.decode(said)
    start = found.start
    bad = [
        (replace(start, head_rows=1), "head rows"),
        (replace(start, head_rows=-1), "head rows"),
        (replace(start, enters_at=noised.model.backbone.depth), "enter at layer"),
        (replace(start, enters_at=-1), "of type 'lora', expected the method's 'soft'"),
        (replace(start, enters_at=-2), "enter at layer"),
        (replace(start, vectors_PD=torch.ones(3, 1, dtype=torch.int64)), "of type 'tokens', expected"),
        (start.with_vectors(start.vectors_PD * torch.nan), "not finite"),
        (start.with_vectors(start.vectors_PD * 1e6), "times as long"),
        (start.with_vectors(start.vectors_PD[:, :-1]), "rows of"),
        (replace(start, vectors_PD=start.vectors_PD.double()), "float32"),
    ]
    for other, why in bad:
        with pytest.raises(CodecError, match=why):
            own.handle(train(orders[0], run_spec.encode(replace(found, start=other))))
    longer = start.with_vectors(torch.cat([start.vectors_PD] * 20))
    with pytest.raises(PolicyError, match=r"prompt.num_tokens = 60; site.toml, by default: at most 32"):
        own.handle(train(orders[0], run_spec.encode(replace(found, start=longer))))
    assert not own.runs
    assert own.status()["epsilon"]["spent"] == 0
    own.handle(train(orders[0], said))


@pytest.mark.parametrize(
    ("method", "change", "why"),
    [
        ("feddtpt", lambda start: replace(start, vectors_PD=start.vectors_PD + 10**6), "token ids"),
        ("feddtpt", lambda start: replace(start, vectors_PD=start.vectors_PD.repeat(1, 2)), "ids in one column"),
        ("feddtpt", lambda start: replace(start, head_rows=1), "1 head rows"),
        ("feddtpt", lambda start: replace(start, enters_at=1), "enter at layer 1, expected 0"),
        ("fedlora", lambda start: replace(start, vectors_PD=start.vectors_PD[1:]), "no LoRA weights"),
        ("fedlora", lambda start: start.with_vectors(1e6 * start.vectors_PD), "times as long"),
    ],
)
def test_site_given_words_or_weights_of_no_run_refuses_them_unpaid(tmp_path, method, change, why):
    one = context(tmp_path, method)
    own = site(one, "site-0", tmp_path, methods=(method,))
    orders, said = begun(one.with_method(build_method(one, one.experiment.method)))
    found = run_spec.decode(said)
    with pytest.raises(CodecError, match=why):
        own.handle(train(orders[0], run_spec.encode(replace(found, start=change(found.start)))))
    assert not own.runs
    own.handle(train(orders[0], said))
    own.close()


def test_a_site_whose_records_do_not_fit_beside_a_prompt_does_not_open(noised, tmp_path):
    with pytest.raises(SiteError, match=r"fits with a prompt of 64 virtual tokens.*max_num_tokens"):
        site(noised, "site-0", tmp_path, max_num_tokens=64)
    assert not (tmp_path / "site-0").exists()


def test_a_round_is_scored_once_where_the_scores_stay(noised, tmp_path, opened, monkeypatch):
    own, (orders, said) = opened(noised, "site-0", tmp_path), begun(noised)
    own.handle(train(orders[0], said))
    scored: list[int] = []
    monkeypatch.setattr(own, "_scores", lambda run, order: scored.append(order.round) or {})
    for place in (0, 0, 1, 0, 1):
        assert own.handle(codec.encode_call(SiteRequest("evaluate", "a" * 32, orders[place]))) == b"{}"
    assert scored == [1, 2]


def test_an_evaluation_that_fails_is_answered_as_one_that_does_not(noised, tmp_path, opened, monkeypatch):
    own, (orders, said) = opened(noised, "site-0", tmp_path), begun(noised)
    own.handle(train(orders[0], said))
    monkeypatch.setattr("ficpd.deployment.site.site.score_prompt", lambda *given: 1 / 0)
    answers = []
    with suppress(ZeroDivisionError):
        answers.append(own.handle(codec.encode_call(SiteRequest("evaluate", "a" * 32, orders[0]))))
    assert answers == [b"{}"]
    assert "ZeroDivisionError" in own.status()["last_error"]["error"]


def test_terms_are_asked_for_and_then_kept(noised, tmp_path, opened):
    own, (orders, said) = opened(noised, "site-0", tmp_path), begun(noised)
    with pytest.raises(SpecMissingError):
        own.handle(train(orders[0]))
    own.handle(train(orders[0], said))
    own.handle(train(orders[1]))


def test_no_more_orders_than_the_terms_plan(noised, tmp_path, opened):
    own, (orders, said) = opened(noised, "site-0", tmp_path), begun(noised, rounds=4)
    for order in orders[:3]:
        own.handle(train(order, said))
    spent = own.status()["epsilon"]["spent"]
    assert spent <= 4.0
    with pytest.raises(PolicyError, match="not in the run's spec"):
        own.handle(train(orders[3]))
    assert own.status()["epsilon"]["spent"] == spent


def test_the_budget_is_over_all_runs_and_a_run_that_does_not_fit_spends_nothing(noised, tmp_path, opened):
    own, (orders, said) = opened(noised, "site-0", tmp_path, epsilon=5.0), begun(noised)
    for order in orders:
        own.handle(train(order, said))
    spent = own.status()["epsilon"]["spent"]
    assert 3.0 < spent <= 4.0
    with pytest.raises(BudgetError, match=r"on other runs, and this one would make it .* allows 5"):
        own.handle(train(orders[0], said, run="b" * 32))
    assert own.status()["epsilon"]["spent"] == spent
    own.close()
    wider = opened(noised, "site-0", tmp_path, epsilon=9.0)
    wider.handle(train(orders[0], said, run="b" * 32))
    assert spent < wider.status()["epsilon"]["spent"] < 9.0
    assert [r["rounds_served"] for r in wider.status()["runs"].values()] == [3, 1]


@pytest.mark.parametrize(("policy", "words"), [
    ({"methods": ["ficpd"]}, r"small.toml line \d+: method.name = 'fedavg'.*policy.methods|methods are 'ficpd'"),
    ({"mechanisms": ["none"]}, r"small.toml line \d+: privacy is 'record_gaussian'"),
    ({"max_local_steps": 1}, r"small.toml line \d+: training.local_steps = 2; site.toml, by default: at most 1"),
    ({"max_batch_size": 2}, r"training.batch_size = 4"),
    ({"max_candidates": 7}, r"training.directions = 4; site.toml, by default: at most 3"),
    ({"max_candidates": 15}, r"training.population = 16"),
    ({"max_rounds": 2}, r"federation.num_rounds = 3"),
    ({"max_clip_norm": 1e-6}, r"privacy.clip_norm = "),
])  # fmt: skip
def test_what_the_policy_does_not_allow_is_refused_by_line_and_spends_nothing(noised, tmp_path, opened, policy, words):
    own, (orders, said) = opened(noised, "site-0", tmp_path, **policy), begun(noised)
    with pytest.raises(PolicyError, match=words):
        own.handle(train(orders[0], said))
    assert own.status()["epsilon"]["spent"] == 0
    assert not own.runs


def test_a_search_has_no_more_generations_than_the_policy_has_steps(tmp_path, opened):
    searched = context(tmp_path, "fedbpt")
    own, (orders, said) = opened(searched, "site-0", tmp_path, methods=["fedbpt"], max_local_steps=7), begun(searched)
    with pytest.raises(PolicyError, match=r"method.iterations = 8; site.toml, by default: at most 7"):
        own.handle(train(orders[0], said))


@contextmanager
def older_copy(folder: Path) -> Iterator[None]:
    """Puts the ledger back afterwards, as it is now."""
    copy = {file.name: file.read_bytes() for file in folder.glob(LEDGER + "*")}
    yield
    for file in folder.glob(LEDGER + "*"):
        file.unlink()
    for name, body in copy.items():
        (folder / name).write_bytes(body)


def test_an_older_copy_of_the_ledger_is_refused(noised, tmp_path):
    orders, said = begun(noised)
    with closing(site(noised, "site-0", tmp_path)) as own:
        own.handle(train(orders[0], said))
    with older_copy(tmp_path / "site-0"), closing(site(noised, "site-0", tmp_path)) as own:
        own.handle(train(orders[1]))
    with pytest.raises(LedgerError, match="knows of 1 assignments, and 2 were executed"):
        site(noised, "site-0", tmp_path)


def test_an_older_copy_without_an_assignment_that_failed_is_refused(noised, tmp_path, monkeypatch):
    """It may have failed because of the records, so that it must not be tried again."""
    orders, said = begun(noised)
    with closing(site(noised, "site-0", tmp_path)) as own:
        own.handle(train(orders[0], said))
    with older_copy(tmp_path / "site-0"), closing(site(noised, "site-0", tmp_path)) as own:
        monkeypatch.setattr(type(own.model), "answer", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            own.handle(train(orders[1]))
    with pytest.raises(LedgerError, match="knows of 1 assignments, and 2 were executed"):
        site(noised, "site-0", tmp_path)


def test_a_half_written_ledger_is_refused_and_left_as_it_is(noised, tmp_path):
    own, (orders, said) = site(noised, "site-0", tmp_path), begun(noised)
    own.handle(train(orders[0], said))
    own.close()
    ledger = tmp_path / "site-0" / LEDGER
    half = ledger.read_bytes()[: ledger.stat().st_size // 2]
    ledger.write_bytes(half)
    with pytest.raises(LedgerError, match="restore the file"):
        site(noised, "site-0", tmp_path).handle(train(orders[1]))
    assert ledger.read_bytes() == half


def test_one_process_at_a_time(noised, tmp_path, opened):
    opened(noised, "site-0", tmp_path)
    with pytest.raises(SiteError, match="two would spend one budget"):
        opened(noised, "site-0", tmp_path)
    assert (tmp_path / "site-0").stat().st_mode & 0o777 == 0o700


def test_what_does_not_quote_a_record_is_told_and_nothing_else(noised, tmp_path, opened):
    own = opened(noised, "site-0", tmp_path)
    assert "round 3" in own.public_error(PolicyError("round 3"))
    kinds = (ValueError, DataError, BackboneError, PrivacyError, LedgerError, ConfigError, KeyError)
    assert len({own.public_error(kind("secret words")) for kind in kinds}) == 1
    assert "1.987" not in own.public_error(BudgetError("epsilon = 1.987, which tells the number of records"))
    assert "1.987" in own.status()["last_error"]["error"]
    assert "secret" not in own.public_error(DataError("secret words of a record"))
    assert "secret words" in own.status()["last_error"]["error"]


def test_scores_leave_only_where_nothing_was_promised_and_the_owner_says_so(tmp_path):
    for changes, shares, told in (((), True, True), ((), False, False), (NOISED, True, False)):
        where = tmp_path / f"{len(changes)}{shares}"
        one = context(where, "fedavg", *changes)
        own, (orders, said) = site(one, "site-0", where, share_metrics=shares), begun(one)
        own.handle(train(orders[0], said))
        found = json.loads(own.handle(codec.encode_call(SiteRequest("evaluate", "a" * 32, orders[0]))))
        assert bool(found) == told
        assert "accuracy" in own.status()["runs"]["a" * 32]["scores"]["personal"]
        own.close()


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_and_ends_the_same(tmp_path):
    one = context(tmp_path, "fpl", *NOISED)
    with grids.sites(one) as found:
        whole = served(one, found, tmp_path / "whole")
    spent = {}
    with grids.sites(one) as found:
        lines: list[str] = []

        def stops(line: str) -> None:
            lines.append(line)
            if line.startswith("round 2/"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            served(one, found, tmp_path / "cut", stops)
        checkpoint = tmp_path / "cut" / "checkpoint"
        served(one, found, tmp_path / "cut", lines.append, resume=True)
        spent = {name: own.status()["epsilon"]["spent"] for name, own in found.items()}
        assert checkpoint.exists()
    assert all(0 < epsilon <= 4.0 for epsilon in spent.values())
    left, right = (PromptLibrary.load(tmp_path / name).candidates() for name in ("whole", "cut"))
    assert all(torch.equal(left[name].vectors_PD, right[name].vectors_PD) for name in left)
    assert whole.num_rounds == 3


def test_a_coordinator_without_its_checkpoint_does_not_go_on_without_what_sites_have_sent(tmp_path):
    one, out = context(tmp_path, "fedavg", *NOISED), tmp_path / "cut"

    def stops(line: str) -> None:
        if line.startswith("round 2/"):
            raise KeyboardInterrupt

    with grids.sites(one) as found:
        with pytest.raises(KeyboardInterrupt):
            served(one, found, out, stops)
        newest = (out / "checkpoint").read_bytes()
        (out / "checkpoint").unlink()
        with pytest.raises(RunError, match=r"has 2 rounds.*is gone.*Restore the newest checkpoint"):
            served(one, found, out, resume=True)
        (out / "checkpoint").write_bytes(newest)
        assert served(one, found, out, resume=True).num_rounds == 3


def test_whoever_sends_terms_does_not_choose_what_a_site_imports(noised, tmp_path, opened):
    own, (orders, said) = opened(noised, "site-0", tmp_path), begun(noised)
    found = run_spec.decode(said)
    for part, module in (("method", "antigravity.x"), ("privacy", "this.module"), ("compression", "os.path")):
        for changed in ({part: {"name": module}}, {"metrics": ({"name": module},)}):
            tree = noised.experiment.model_copy(update=changed)
            body = run_spec.encode(replace(found, experiment=tree))
            with pytest.raises(CodecError, match="module outside the package"):
                own.handle(train(orders[0], body))
    assert not own.runs


@pytest.mark.parametrize("what", ["train", "evaluate"])
def test_an_order_of_another_shape_touches_no_record(tmp_path, opened, what):
    """Whether it could be carried out would depend on the records that were drawn, or on what the site chose by them."""
    one = context(tmp_path, "fpl", *NOISED)
    own, (orders, said) = opened(one, "site-0", tmp_path), begun(one)
    own.handle(train(orders[0], said))
    spent, fingerprint = own.status()["epsilon"]["spent"], one.model.backbone.fingerprint
    good = codec.decode_assignment(orders[1], fingerprint)
    prompt = good.arrays["prompt"]
    longer = torch.cat([prompt, prompt])
    bad = [
        replace(good, arrays={**good.arrays, "prompt": longer}),
        replace(good, arrays={**good.arrays, "global": longer}),
        replace(good, arrays={**good.arrays, "more": prompt}),
        replace(good, arrays={**good.arrays, "prompt": prompt.double()}),
        replace(good, arrays={**good.arrays, "prompt": 1e4 * prompt}),
        replace(good, arrays={}),
        replace(good, facts={}),
        replace(good, facts={**good.facts, "rate": -1.0}),
        replace(good, facts={**good.facts, "choosing": "yes"}),
        replace(good, facts={**good.facts, "more": 1}),
        replace(good, method="fedavg"),
        replace(good, round=1.5),
        replace(good, round=0),
        replace(good, round=5),
    ]
    for order in bad:
        with pytest.raises(CodecError):
            own.handle(codec.encode_call(SiteRequest(what, "a" * 32, codec.encode_assignment(order, fingerprint))))
    assert own.status()["epsilon"]["spent"] == spent
    assert own.handle(codec.encode_call(SiteRequest("evaluate", "a" * 32, orders[1]))) == b"{}"


def test_a_run_keeps_the_terms_it_began_with_and_begins_with_an_order(noised, tmp_path, opened):
    own, (orders, said) = opened(noised, "site-0", tmp_path), begun(noised)
    with pytest.raises(CodecError, match="begins with its first assignment"):
        own.handle(codec.encode_call(SiteRequest("evaluate", "a" * 32, orders[0], said)))
    own.handle(train(orders[0], said))
    (kept,) = (tmp_path / "site-0" / "runs").glob("*/spec")
    first, found = kept.read_bytes(), run_spec.decode(said)
    other = run_spec.encode(replace(found, schedule=replace(found.schedule, num_rounds=100)))
    own.close()
    again = opened(noised, "site-0", tmp_path)
    again.handle(train(orders[1], other))
    assert kept.read_bytes() == first
    assert again.runs["a" * 32].participations == 3
    for name in ("", "../x", "A" * 32, "a" * 65):
        with pytest.raises(CodecError, match="hexadecimal"):
            again.handle(train(orders[1], said, run=name))


def test_no_more_orders_than_the_cohorts_have_this_site_in(tmp_path, opened):
    one = context(tmp_path, "fedavg", *NOISED, "federation.num_rounds=6", "federation.clients_per_round=1")
    own, (orders, said) = opened(one, "site-0", tmp_path), begun(one)
    own.handle(train(orders[0], said))
    (run,) = own.runs.values()
    assert 1 <= run.participations < 6
    for order in orders[1 : run.participations]:
        own.handle(train(order))
    with pytest.raises(PolicyError, match="all that its spec plans"):
        own.handle(train(orders[run.participations]))
    assert own.status()["epsilon"]["spent"] <= 4.0


def test_what_would_tell_how_many_records_there_are_by_being_refused_is_refused_always(noised, tmp_path, opened):
    own, (orders, said) = opened(noised, "site-0", tmp_path), begun(noised)
    found = run_spec.decode(said)
    for more in ({"noise_multiplier": 5.0}, {"statistics": {"weight": 0.1}}):
        privacy = {**found.experiment.privacy, **more}
        body = run_spec.encode(replace(found, experiment=found.experiment.model_copy(update={"privacy": privacy})))
        with pytest.raises(PolicyError, match=next(iter(more))):
            own.handle(train(orders[0], body))


def test_a_state_folder_that_others_may_look_into_is_closed_to_them(noised, tmp_path, opened):
    (tmp_path / "site-0").mkdir(mode=0o755)
    (tmp_path / "site-0").chmod(0o755)
    opened(noised, "site-0", tmp_path)
    assert (tmp_path / "site-0").stat().st_mode & 0o777 == 0o700


def test_directions_that_stretch_are_refused(tmp_path, opened):
    one = context(tmp_path, "fedavg", *NOISED, 'compression.name="subspace"', "compression.dimension=8")
    own, (orders, _) = opened(one, "site-0", tmp_path), begun(one)
    method = build_method(one, one.experiment.method)
    coordinates = one.compression.subspace
    schedule = build_schedule(one, method)
    said = RunSpec(one.experiment, recipe(one), "small.toml", list(one.shards), schedule, one.start, coordinates)
    coordinates.rows = 3 * coordinates.rows
    with pytest.raises(CodecError, match="not orthonormal"):
        own.handle(train(orders[0], run_spec.encode(said)))


def test_a_method_that_needs_no_mechanism_is_none_to_a_policy_that_asks_for_one(tmp_path, opened):
    """`local` releases nothing by its own word, and so gets no noise; what leaves would still carry a count of records."""
    one = context(tmp_path, "local", *NOISED)
    own, (orders, said) = opened(one, "site-0", tmp_path, methods=["local"], mechanisms=["record_gaussian"]), begun(one)
    with pytest.raises(PolicyError, match="local runs without any guarantee"):
        own.handle(train(orders[0], said))
    assert own.status()["runs"] == {}


def from_file(folder: Path, mechanisms: str, dtype: str, chunk: str) -> Site:
    """A site from its file, as its owner starts it."""
    small.table(folder / "own.csv")
    (folder / "site.toml").write_text(
        f"""name = "site-0"
socket = "north.sock"
state = "site-0"
task = {{ name = "classification", labels = {{ good = "good fine", bad = "bad dull" }}, instruction = "it was" }}
data = {{ source = "own.csv" }}
policy = {{ epsilon = 2, mechanisms = ["{mechanisms}"] }}
[engine]
{chunk}
[backbone]
name = "tiny"
{dtype}
"""
    )
    return build_site(folder / "site.toml", lambda line: None)


@pytest.mark.parametrize(("mechanisms", "dtype", "chunk", "exact", "taken"), [
    ("record_gaussian", "", "", True, "auto"),
    ("record_gaussian", "", "chunk_tokens = 512", False, "float32"),
    ("record_gaussian", 'dtype = "bfloat16"', "chunk_tokens = 512", False, "bfloat16"),
    ("client_gaussian", "", "", False, "auto"),
    ("client_gaussian:central", "", "", False, "auto"),
])  # fmt: skip
def test_a_sites_engine_is_exact_where_noise_is_for_one(tmp_path, mechanisms, dtype, chunk, exact, taken):
    """Unless the owner wants it otherwise, and then in float32, unless the owner wants that otherwise, too."""
    own = from_file(tmp_path, mechanisms, dtype, chunk)
    assert own.model.exact == exact
    assert own.config.backbone.dtype == taken
    own.close()


def test_a_run_with_noise_at_the_server_asks_a_site_as_often_as_the_server_draws_it(tmp_path, opened):
    """Its cohorts are drawn in private, and who is in the public ones says nothing."""
    one = context(tmp_path, "fedavg", *SUMMED, "federation.num_rounds=6", "federation.clients_per_round=1")
    orders, said = begun(one)
    own = opened(one, "site-0", tmp_path, mechanisms=["client_gaussian:central"])
    own.handle(train(orders[0], said))
    for order in orders[1:]:
        own.handle(train(order))


def test_what_was_scored_is_known_after_a_restart(noised, tmp_path, monkeypatch):
    orders, said = begun(noised)
    scored: list[int] = []
    monkeypatch.setattr(Site, "_scores", lambda self, run, order: scored.append(order.round) or {})
    for _ in range(2):
        own = site(noised, "site-0", tmp_path)
        own.handle(train(orders[0], said))
        own.handle(codec.encode_call(SiteRequest("evaluate", "a" * 32, orders[0])))
        own.close()
    assert scored == [1]


def test_a_readout_that_is_far_too_long_does_not_lengthen_the_reach(noised):
    start, backbone = noised.start, noised.model.backbone
    task = small.classes(tuned_head=True)
    rows = torch.cat([start.vectors_PD, start.vectors_PD[:1].repeat(task.head_rows, 1)])
    legal = replace(start.with_vectors(rows), head_rows=task.head_rows)
    run_spec.validate_initial_prompt(legal, task, backbone)
    rows = rows.clone()
    rows[-1] *= 1e18
    with pytest.raises(CodecError, match="times as long"):
        run_spec.validate_initial_prompt(legal.with_vectors(rows), task, backbone)
