"""The client of one organisation: handles calls within its policy and budget, and answers with released updates."""

import json
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ficpd import __version__
from ficpd.backbones.query_engine import QueryEngine, run_queries
from ficpd.data.subjects import UnitCounts, count_units
from ficpd.deployment import run_spec
from ficpd.deployment.run_spec import RunSpec, group_of
from ficpd.deployment.site import policy, state_folder
from ficpd.deployment.site.config import SiteConfig
from ficpd.deployment.site.refusals import Refusals
from ficpd.deployment.site.signing import member_of
from ficpd.deployment.site.status import LAST_ERROR, RUNS, check_data_unit, ledger_status
from ficpd.errors import BudgetError, CodecError, LedgerError, PolicyError, PrivacyError, SiteError
from ficpd.evaluation.evaluate import predictions_of, score_prompt
from ficpd.federation import codec
from ficpd.federation.client import Client
from ficpd.federation.codec import SiteRequest
from ficpd.federation.execution import execute_assignment, local_model, restore_update
from ficpd.federation.method import Method, validate_assignment
from ficpd.federation.privacy_plan import build_mechanism, privacy_config_for
from ficpd.federation.secure_sum import PHASES, VECTOR, terms
from ficpd.interfaces import Mechanism, ReleaseKind, Task
from ficpd.methods.shared.readouts import assigned_readout
from ficpd.privacy import accountant
from ficpd.privacy.ledger import Budget, Ledger, Unit
from ficpd.storage import atomic_write
from ficpd.types import JSON, Assignment, ClientCard, ClientData

MAX_LOADED_RUNS = 4
"""The maximum number of runs in memory. Others are restored from their spec and the ledger."""
LEDGER, SEED, WITNESS, SCORED, REFUSED = "ledger.sqlite", "seed", "orders", "scored", "refused"
PUBLIC_ERRORS = (PolicyError, CodecError, SiteError)
"""Errors about specs and messages. Their text does not depend on records."""


class SpecMissingError(Exception):
    """The site does not have the spec of the assignment's run."""


@dataclass
class Run:
    """A run of this site: its spec and the spec's bytes, its method, and this site as its client.

    scored: the last scored round of a run whose scores stay local.
    planned: whether its cost is planned from this site's records; not so while it has only exchanged keys.
    """

    spec: RunSpec
    body: bytes
    method: Method
    client: Client
    participations: int
    scored: int = 0
    planned: bool = True


class Site:
    """A site's records, ledger and runs. `own`: the text and name of the site's file, for objections.

    Guarantees (`tests/deployment/site/`):
    - The ledger charges an assignment on disk before its update is sent.
    - A repeated assignment returns the same bytes and costs nothing.
    - The policy, the run's plan and the budget over all runs limit every assignment; a refusal costs nothing.
    - The answer to a call that costs nothing does not depend on the number of records, except for counted refusals.
    - The site sends only released updates, its card, and errors that quote no record.
    - One process at a time uses the state folder, and only its owner can read it.
    """

    def __init__(
        self, config: SiteConfig, shard: ClientData, task: Task, model: QueryEngine,
        own: tuple[str, str] = ("", "site.toml"), say: Callable[[str], None] = lambda line: None,
        lock: "threading.Lock | None" = None,
    ):  # fmt: skip
        self.config, self.shard, self.task, self.model, self.own, self.say = config, shard, task, model, own, say
        self.folder = config.state
        self.turn = lock or threading.Lock()  # one assignment at a time, also of sites with a common backbone
        self.runs: dict[str, Run] = {}
        policy.check_record_lengths(config, shard, task, model.backbone)
        state_folder.make_private(self.folder)
        self._held = state_folder.lock(self.folder)
        self.ledger = Ledger(self.folder / LEDGER, f"site {config.name}")
        self.refusals = Refusals(self.folder / REFUSED, config.name, config.policy.max_refusals, self.ledger)
        try:
            self._check_witness()
            check_data_unit(self.ledger, config, count_units(shard.train))
        except LedgerError:
            self.close()
            raise
        self.seed = config.simulation.private_seed if config.simulation else state_folder.read_seed(self.folder / SEED)

    @property
    def card(self) -> ClientCard:
        group = self.config.name.partition(".")[0] if "." in self.config.name else None
        return ClientCard(self.config.name, self.config.card | ({"group": group} if group else {}))

    def handle(self, body: bytes) -> bytes:
        """Answers a call. Raises `SpecMissingError`, or errors for `public_error`."""
        call = codec.decode_call(body)
        if call.what == "hello":
            card, rehearsal = self.card, self.config.simulation is not None
            known = {"name": card.name, "card": dict(card.metadata), "version": __version__, "rehearsal": rehearsal}
            return json.dumps({**known, "backbone": self.model.backbone.fingerprint}).encode()
        if call.what not in ("train", "evaluate"):
            raise CodecError(f"the call is {call.what!r}, expected hello, train or evaluate")
        with self.turn:
            began, fingerprint = time.perf_counter(), self.model.backbone.fingerprint
            message = codec.decode_assignment(call.assignment, fingerprint)
            order = terms.decode_order(message, fingerprint) if message.method == VECTOR else None
            assignment = order.assignment if order else message
            if order:
                self._check_keys(call.run, order)
            run = self._run(call, assignment, message.method)
            if message.method in PHASES and order is None:
                _check_round(message, run.spec)
                return codec.encode_assignment(terms.answer(run.method.name, run.client, message), fingerprint)
            validate_assignment(assignment, run.method, run.client.start, run.spec.schedule.num_rounds)
            if call.what == "evaluate":
                return self._evaluated(call.run, run, assignment)
            try:
                return self._trained(call.run, run, assignment, began, order)
            finally:
                self._forget_unpaid(call.run, run)

    def _forget_unpaid(self, name: str, run: Run) -> None:
        """Forgets a run without a completed assignment, so that it does not count for `policy.max_runs`.

        Stores a run that was not charged although its plan has costs: its acceptance reveals something about the records.
        """
        account = run.client.account
        assert account is not None
        if run.client.mechanism.planned_costs() and account.spent() == account.spent_in_other_runs():
            self.refusals.accept_unpaid(run.body)
        if not account.num_assignments():
            self.runs.pop(name, None)
            (self._run_folder(name) / "spec").unlink(missing_ok=True)
            with suppress(OSError):
                self._run_folder(name).rmdir()

    def _trained(
        self, name: str, run: Run, assignment: Assignment, began: float, order: "terms.VectorOrder | None"
    ) -> bytes:
        account = run.client.account
        assert account is not None
        if not (stored := self._run_folder(name) / "spec").exists():
            atomic_write(stored, run.body)
        if not (again := account.stored_update(assignment.round, assignment.method) is not None):
            _check_round(assignment, run.spec)
        if not again and (done := account.num_assignments()) >= run.participations:
            raise PolicyError(
                f"{self.config.name} has executed {done} assignments of this run, all that its spec plans; nothing was "
                "spent on this one. Start a new run for more rounds"
            )
        release = terms.releasing(run.client, order) if order else None
        try:
            update = run_queries(self.model, execute_assignment(run.method, run.client, assignment, release))
        except Exception as error:
            if not isinstance(error, PrivacyError):  # the ledger counts the failed assignment
                self._witness()
            raise
        encode = terms.encode_vector if order else codec.encode_update
        body = encode(update, assignment.round, self.model.backbone.fingerprint)
        self._witness()
        of = f"epsilon {account.epsilon():.3g} of {self.config.policy.epsilon:g}"
        spent = of if account.spent() else "no epsilon spent"
        how = "again, from store" if again else f"{time.perf_counter() - began:.1f} s"
        self.say(f"run {name[:8]} round {assignment.round} {assignment.method}: {len(body)} bytes, {how}; {spent}")
        return body

    def _evaluated(self, name: str, run: Run, assignment: Assignment) -> bytes:
        """Scores the site's test records. Sends the scores only without a DP guarantee and if the policy allows it.

        If scores stay local, the answer does not depend on the outcome. Each round is then scored at most once, because
        timing could leak information.
        """
        client = run.client
        share, scores = self.config.policy.share_metrics and client.mechanism.unit == "none", {}
        again = assignment.round <= run.scored and not share
        try:
            if client.test and not again:
                run.scored = max(run.scored, assignment.round)
                atomic_write(self._run_folder(name) / SCORED, f"{run.scored}\n")
                scores = self._scores(run, assignment)
                atomic_write(self._run_folder(name) / "scores.json", json.dumps(scores, indent=2) + "\n")
        except Exception as error:
            if share:
                raise
            self.public_error(error)
        return json.dumps(scores if share else {}).encode()

    def _scores(self, run: Run, assignment: Assignment) -> dict[str, JSON]:
        client = run.client
        batch, targets = client.encoded("test"), client.task.targets(client.test)
        read = batch.with_readout(assigned_readout(assignment))
        prompts = {key: assignment.arrays[key] for key in ("prompt", "global") if key in assignment.arrays}
        scores = {key: score_prompt(client.task, prompt, read, targets, self.model) for key, prompt in prompts.items()}
        scores["zero_shot"] = score_prompt(client.task, client.start.vectors_PD, batch, targets, self.model)
        own = run_queries(self.model, local_model(run.method, client, assignment))
        found = run_queries(self.model, predictions_of(client.task, own, batch))
        return scores | {"personal": client.task.score(found, targets)}

    def _run(self, call: SiteRequest, assignment: Assignment, message: str) -> Run:
        """Returns the run of a call: from memory, restored from disk, or new and within the policy.

        A new run's first assignment is checked before its cost, because the cost depends on the number of records. A secure
        sum's messages other than `VECTOR` cost nothing, so a run is planned from the records only at its first vector.
        """
        known, pays = self.runs.get(call.run), message not in PHASES or message == VECTOR
        if known and (known.planned or not pays):
            return known
        folder = self._run_folder(call.run)
        stored = folder / "spec"
        if not stored.exists() and call.what != "train":
            raise CodecError("a run begins with its first assignment, and this site has executed none of it")
        if not stored.exists() and not call.spec and not known:
            raise SpecMissingError
        if not stored.exists() and len(list(folder.parent.glob("*"))) >= self.config.policy.max_runs:
            most = self.config.policy.max_runs
            raise PolicyError(f"{self.config.name} has taken part in {most} runs, its policy's max_runs")
        body = stored.read_bytes() if stored.exists() else known.body if known else call.spec
        spec = run_spec.decode(body, self.config.policy.methods)
        if stored.exists():
            run = self._start(call.run, spec, None, body)
        else:
            policy.check_message(self.config, spec, message)
            run = self._start(call.run, spec, assignment, body, pays)
        if known:
            run.client.member = known.client.member
        elif not stored.exists():
            self.say(f"run {call.run[:8]}: takes part in {spec.experiment.name}, up to {run.participations} rounds")
        self.runs = dict(list(self.runs.items())[-MAX_LOADED_RUNS + 1 :]) | {call.run: run}
        return run

    def _check_keys(self, name: str, order: "terms.VectorOrder") -> None:
        """Raises `PolicyError` if a run's first vector cannot be masked, before the run is planned from the records."""
        known, round = self.runs.get(name), order.assignment.round
        if (self._run_folder(name) / "spec").exists() or (known and known.planned):
            return
        if known is None or known.client.member is None:
            raise PolicyError(f"{self.config.name} has no keys of round {round} of this run. It is lost for this round")
        known.client.member.check_vector(round, order.shares)

    def _start(self, name: str, spec: RunSpec, first: Assignment | None, body: bytes, pays: bool = True) -> Run:
        """Starts a run with its first assignment, or restores it. Without `pays`, plans it from `least_records`.

        Raises `CodecError`, `PolicyError`, or `BudgetError` if the whole run does not fit into the budget.
        """
        config, fingerprint = self.config, self.model.backbone.fingerprint
        if spec.start.backbone != fingerprint:
            raise CodecError(
                f"the run is for backbone {spec.start.backbone}, this site has {fingerprint}; load the same"
            )
        policy.check(config, *self.own, spec, self.model.backbone)
        method, compression = spec.method(), spec.compression()
        run_spec.validate_initial_prompt(spec.start, self.task, self.model.backbone, method.capabilities.prompt_type)
        method.adapt_to(spec.tasks([self.task]), self.model.backbone)
        policy.check_statistics(method.capabilities.statistics_once, spec.experiment.privacy)
        if first is not None:
            if first.method not in PHASES:
                validate_assignment(first, method, spec.start, spec.schedule.num_rounds)
            _check_round(first, spec)
            self.refusals.check(body)
        counts = count_units(self.shard.train)
        if not pays and (least := spec.experiment.privacy["least_records"]):
            counts = UnitCounts(least, None if counts.subjects is None else least)
        plan = spec.plan(config.name, counts, method)
        try:
            mechanism = self._mechanism(spec, method, plan)
            budget = self._budget(name, mechanism) if pays else Budget(config.policy.epsilon, config.policy.delta)
        except (PolicyError, LedgerError) as error:  # `LedgerError`: another unit
            raise PolicyError(str(error)) from error
        except PrivacyError as error:  # the same answer for all causes that depend on the number of records
            self.refusals.refuse(body)
            raise BudgetError(str(error)) from error
        account = self.ledger.account(config.name, budget, name, Unit.of(mechanism.guarantee()))
        # Under central DP a single release has no cost here. The first assignment is charged for the whole plan, because the
        # server's private cohorts determine the number of assignments.
        central = mechanism.cost(ReleaseKind.SUM) is not None
        pending = mechanism.planned_costs() if central and not account.num_assignments() else ()
        client = Client(
            self.card, self.shard.train, self.shard.test, self.task, self.model.backbone, mechanism, compression,
            spec.start, self.seed, account, pending, member=member_of(config, name, spec, mechanism),
        )  # fmt: skip
        if (newest := account.last_round(method.name)) and (stored := account.stored_update(newest, method.name)):
            with suppress(PolicyError):  # the stored assignment failed
                restore_update(client, stored)
        participations = spec.schedule.num_rounds if central else plan.participations
        file = self._run_folder(name) / SCORED
        scored = int(file.read_text(encoding="utf-8")) if file.exists() else 0
        return Run(spec, body, method, client, participations, scored, pays)

    def _mechanism(self, spec: RunSpec, method: Method, plan: Any) -> Mechanism:
        """Builds the recipe's mechanism, with cryptographic noise unless this is a simulation."""
        noise = {} if self.config.simulation else {"noise": "cryptographic"}
        group = group_of(self.config.name, spec.experiment.groups)
        mechanism = build_mechanism(privacy_config_for(method, spec.experiment.privacy), group, plan, **noise)
        # A method that declares no releases gets no noise under any recipe.
        if mechanism.unit == "none" and "none" not in self.config.policy.mechanisms:
            raise PolicyError(
                f"{method.name} runs without any guarantee, and the mechanisms that {self.config.name} allows are "
                f"{', '.join(self.config.policy.mechanisms)}"
            )
        return mechanism

    def _budget(self, run: str, mechanism: Mechanism) -> Budget:
        """Returns the policy's budget over all runs. Raises `BudgetError` unless the whole run fits into the rest."""
        allowed, planned = self.config.policy, list(mechanism.planned_costs())
        account = self.ledger.account(self.config.name, Budget(None, allowed.delta), run)
        if not planned:
            return Budget(allowed.epsilon, allowed.delta)
        self.ledger.check_unit(self.config.name, Unit.of(mechanism.guarantee()).name)
        accountant.check_price(planned, allowed.delta)
        others = account.spent_in_other_runs()
        together = accountant.merge([*others, *planned])
        after = accountant.epsilon(together, allowed.delta)
        if after > allowed.epsilon:
            raise BudgetError(
                f"{self.config.name} has spent epsilon = {accountant.epsilon(others, allowed.delta):.4g} on other runs, and "
                f"this one would make it {after:.4g}; its policy allows {allowed.epsilon:g} in all (delta = "
                f"{allowed.delta:g}). Nothing was spent. Ask for less, or agree on a larger budget"
            )
        return Budget(allowed.epsilon, allowed.delta, tuple(together))

    def status(self) -> dict[str, JSON]:
        """Returns the site's status for its owner; a server never sees it."""
        return ledger_status(self.ledger, self.config)

    def public_error(self, error: Exception) -> str:
        """Stores an error for the owner and returns the text that the caller may see."""
        full = {"at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "error": f"{type(error).__name__}: {error}"}
        self.say(f"refused or failed: {full['error']}")
        try:
            atomic_write(self.folder / LAST_ERROR, json.dumps(full, indent=2) + "\n")
        except OSError:
            self.say("the error could not be stored: the disk may be full")
        if isinstance(error, BudgetError):  # an exact epsilon would reveal the number of records
            return f"BudgetError: the budget of {self.config.name} does not allow it; its owner sees the figures"
        if isinstance(error, PUBLIC_ERRORS):
            return f"{type(error).__name__}: {error}"
        return "the assignment failed; the site's owner sees the reason (ficpd site status)"

    def close(self) -> None:
        self.ledger.close()
        self._held.close()

    def _run_folder(self, name: str) -> Path:
        """Returns a run's folder. Checks the name, which is untrusted."""
        if not re.fullmatch(r"[0-9a-f]{1,64}", name):
            raise CodecError(f"the run's name is {name[:80]!r}, expected at most 64 hexadecimal digits")
        return self.folder / RUNS / name

    def _witness(self) -> None:
        """Stores the number of executed assignments outside the ledger, to detect an older copy of the ledger."""
        atomic_write(self.folder / WITNESS, f"{self.ledger.num_assignments()}\n")

    def _check_witness(self) -> None:
        file, found = self.folder / WITNESS, self.ledger.num_assignments()
        written = file.read_text(encoding="utf-8").strip() if file.exists() else "0"
        if not written.isdecimal():
            raise LedgerError(
                f"{file} has {written[:20]!r}, expected a number. Restore it and the ledger from one copy"
            )
        if (known := int(written)) > found:
            raise LedgerError(
                f"{self.folder / LEDGER} knows of {found} assignments, and {known} were executed: it is an older copy, "
                "or its -wal file is missing. Restore the newest copy of both"
            )


def _check_round(assignment: Assignment, spec: RunSpec) -> None:
    last = spec.schedule.num_rounds
    if type(assignment.round) is not int or not 1 <= assignment.round <= last:
        raise PolicyError(f"round {assignment.round} is not in the run's spec, which ends with {last}")
