"""One organisation's half of every run: takes calls, obeys its own policy and budget, answers with what was released."""

import fcntl
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ficpd import __version__
from ficpd.backbones.query_engine import QueryEngine, run_queries
from ficpd.deployment import run_spec
from ficpd.deployment.run_spec import RunSpec, group_of
from ficpd.deployment.site import policy
from ficpd.deployment.site.config import SiteConfig
from ficpd.deployment.site.status import LAST_ERROR, RUNS, ledger_status
from ficpd.errors import BudgetError, CodecError, LedgerError, PolicyError, SiteError
from ficpd.evaluation.evaluate import score_prompt
from ficpd.federation import codec
from ficpd.federation.client import Client, calibrated_batch, execute_assignment, personal_prompt, restore_update
from ficpd.federation.codec import SiteRequest
from ficpd.federation.privacy_plan import privacy_config_for, with_group_clip_norm
from ficpd.federation.validation import validate_assignment
from ficpd.interfaces import Mechanism, Method, ReleaseKind, Task
from ficpd.privacy import accountant
from ficpd.privacy.config import DPConfig
from ficpd.privacy.ledger import Budget, Ledger
from ficpd.registry import build_config
from ficpd.storage import atomic_write
from ficpd.types import JSON, Assignment, ClientCard, ClientData

MOST_RUNS = 4
"""So many are kept in memory; an older one is begun again from its terms and the ledger, if it goes on."""
LEDGER, SEED, WITNESS, SCORED = "ledger.sqlite", "seed", "orders", "scored"
TELLS = (PolicyError, CodecError, SiteError)
"""Errors whose words are about terms and messages, and that come whatever the records are."""


class SpecMissingError(Exception):
    """An order of a run whose terms this site has not."""


@dataclass
class Run:
    """A run that the site takes part in: its method, and this site as a client of it."""

    terms: RunSpec
    method: Method
    client: Client
    participations: int
    scored: int = 0
    """The last round whose prompts were scored where the scores stay."""


class Site:
    """`shard`: the records, divided once; `own`: the text of the site's file and its name, for objections.

    Guarantees (`tests/site/`): an order is paid for in the ledger, on disk, before its update leaves; the same order again
    is answered with the same bytes and costs nothing; no order is carried out that the policy, the run's own plan or the
    budget over all runs does not allow, and a refusal costs nothing; whatever a caller sends, what leaves is a released
    update, a card or an error that quotes no record. One process at a time holds the state folder; it is its owner's alone.
    """

    def __init__(
        self, config: SiteConfig, shard: ClientData, task: Task, model: QueryEngine, own: tuple[str, str] = ("", "site.toml"),
        say: Callable[[str], None] = lambda line: None, lock: "threading.Lock | None" = None,
    ):  # fmt: skip
        self.config, self.shard, self.task, self.model, self.own, self.say = config, shard, task, model, own, say
        self.folder = config.state
        self.turn = lock or threading.Lock()  # one order at a time; sites that share a backbone share the lock
        self.runs: dict[str, Run] = {}
        policy.check_record_lengths(config, shard, task, model.backbone)
        _owned(self.folder)
        self._held = _hold(self.folder)
        self.ledger = Ledger(self.folder / LEDGER, f"site {config.name}")
        self._check_witness()
        self.seed = config.simulation.private_seed if config.simulation else _own_seed(self.folder / SEED)

    @property
    def card(self) -> ClientCard:
        group = self.config.name.partition(".")[0] if "." in self.config.name else None
        return ClientCard(self.config.name, self.config.card | ({"group": group} if group else {}))

    def handle(self, body: bytes) -> bytes:
        """Whatever was asked, answered. Raises `SpecMissingError`, or a `FicpdError` whose words may leave."""
        call = codec.decode_call(body)
        if call.what == "hello":
            card = self.card
            known = {"name": card.name, "card": dict(card.metadata), "version": __version__}
            return json.dumps({**known, "backbone": self.model.backbone.fingerprint}).encode()
        if call.what not in ("train", "evaluate"):
            raise CodecError(f"a call asks for {call.what!r}, expected hello, train or evaluate")
        with self.turn:
            began = time.perf_counter()
            run = self._run(call)
            assignment = codec.decode_assignment(call.order, self.model.backbone.fingerprint)
            validate_assignment(assignment, run.method, run.client.start, run.terms.schedule.num_rounds)
            if call.what == "evaluate":
                return self._evaluated(call.run, run, assignment)
            return self._trained(call.run, run, assignment, began)

    def _trained(self, name: str, run: Run, assignment: Assignment, began: float) -> bytes:
        account = run.client.account
        assert account is not None
        again = account.stored_update(assignment.round, assignment.method) is not None
        if not again and assignment.round > run.terms.schedule.num_rounds:
            last = run.terms.schedule.num_rounds
            raise PolicyError(f"round {assignment.round} is not in the run's terms, which end with {last}")
        if not again and (done := account.num_assignments()) >= run.participations:
            raise PolicyError(
                f"{self.config.name} has carried out {done} orders of this run, which is all that its terms plan; nothing "
                "was spent on this one. A longer run needs terms of its own"
            )
        update = run_queries(self.model, execute_assignment(run.method, run.client, assignment))
        body = codec.encode_update(update, assignment.round, self.model.backbone.fingerprint)
        self._witness()
        spent = (
            f"epsilon {account.epsilon():.3g} of {self.config.policy.epsilon:g}"
            if account.spent()
            else "no epsilon spent"
        )
        how = "again, from store" if again else f"{time.perf_counter() - began:.1f} s"
        self.say(f"run {name[:8]} round {assignment.round} {assignment.method}: {len(body)} bytes, {how}; {spent}")
        return body

    def _evaluated(self, name: str, run: Run, assignment: Assignment) -> bytes:
        """Scores on the site's own test records stay here; they are told only where nothing was promised. Where they are
        not, the answer is the same whatever comes of it, and a round is scored once, since how long that takes may tell of
        the records: prompts are the caller's, the choice among them is the records'."""
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
        prompts = {"zero_shot": client.start.vectors_PD, "personal": personal_prompt(run.method, client, assignment)}
        prompts |= {key: assignment.arrays[key] for key in ("prompt", "global") if key in assignment.arrays}
        batches = dict.fromkeys(prompts, batch) | {"personal": calibrated_batch(run.method, client, batch)}
        return {key: score_prompt(prompt, batches[key], targets, self.model) for key, prompt in prompts.items()}

    def _run(self, call: SiteRequest) -> Run:
        """The run of a call: known, kept from before a restart, or new and within the policy."""
        if call.run in self.runs:
            return self.runs[call.run]
        folder = self._run_folder(call.run)
        kept = folder / "terms"
        if not kept.exists() and call.what != "train":
            raise CodecError("a run begins with its first order, and this site has carried out none of it")
        if not kept.exists() and not call.terms:
            raise SpecMissingError
        if not kept.exists() and len(list(folder.parent.glob("*"))) >= self.config.policy.max_runs:
            raise PolicyError(
                f"{self.config.name} has taken part in {self.config.policy.max_runs} runs, its policy's max_runs"
            )
        body = kept.read_bytes() if kept.exists() else call.terms
        found = run_spec.decode(body, self.config.policy.methods)
        run = self._begun(call.run, found)
        if not kept.exists():
            atomic_write(kept, body)
            self.say(f"run {call.run[:8]}: takes part in {found.experiment.name}, up to {run.participations} rounds")
        self.runs = dict(list(self.runs.items())[-MOST_RUNS + 1 :]) | {call.run: run}
        return run

    def _begun(self, name: str, found: RunSpec) -> Run:
        """Raises `PolicyError`, or `BudgetError` if what the whole run would cost is more than is left."""
        config, fingerprint = self.config, self.model.backbone.fingerprint
        if found.start.backbone != fingerprint:
            raise CodecError(
                f"the run is for backbone {found.start.backbone}, this site has {fingerprint}; load the same"
            )
        policy.check(config, *self.own, found, self.model.backbone)
        run_spec.validate_initial_prompt(found.start, self.task, self.model.backbone)
        method, compression = found.method(), found.compression()
        plan = found.plan(config.name, len(self.shard.train))
        mechanism = self._mechanism(found, method, plan)
        account = self.ledger.account(config.name, self._budget(name, mechanism), name)
        # Noised at the server, no single release has a price here: the first order pays for the whole plan, since the sum
        # costs a member the same in every round; and orders come as often as the server's private cohorts have it.
        central = mechanism.cost(ReleaseKind.SUM) is not None
        owed = mechanism.planned_costs() if central and not account.num_assignments() else ()
        client = Client(
            self.card, self.shard.train, self.shard.test, self.task, self.model.backbone, mechanism, compression,
            found.start, self.seed, account, owed,
        )  # fmt: skip
        if (newest := account.last_round(method.name)) and (stored := account.stored_update(newest, method.name)):
            with suppress(PolicyError):  # it failed, and is kept as such
                restore_update(client, stored)
        assignments = found.schedule.num_rounds if central else plan.participations
        return Run(found, method, client, assignments, self._scored(name))

    def _scored(self, name: str) -> int:
        """The last round of a run whose prompts were scored; kept over restarts."""
        file = self._run_folder(name) / SCORED
        return int(file.read_text()) if file.exists() else 0

    def _mechanism(self, found: RunSpec, method: Method, plan: Any) -> Mechanism:
        """As the recipe asks for it, with noise that nobody can repeat unless this is a rehearsal."""
        module, settled = build_config("privacy", privacy_config_for(method, found.experiment.privacy))
        if isinstance(settled, DPConfig) and not self.config.simulation:
            settled = settled.model_copy(update={"noise": "cryptographic"})
        group = group_of(self.config.name, found.experiment.groups)
        mechanism = module.build(with_group_clip_norm(settled, found.experiment.privacy, group), plan)
        # Whatever was asked for, a method that says it releases nothing gets no noise.
        if mechanism.unit == "none" and "none" not in self.config.policy.mechanisms:
            raise PolicyError(
                f"{method.name} runs without any guarantee, and the mechanisms that {self.config.name} allows are "
                f"{', '.join(self.config.policy.mechanisms)}"
            )
        return mechanism

    def _budget(self, run: str, mechanism: Mechanism) -> Budget:
        """The policy's, over all runs. The whole of this run has to fit into what is left before any of it is paid."""
        allowed, planned = self.config.policy, list(mechanism.planned_costs())
        account = self.ledger.account(self.config.name, Budget(None, allowed.delta), run)
        if not planned:
            return Budget(allowed.epsilon, allowed.delta)
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
        """For the site's own people; nothing of it goes to a server."""
        return ledger_status(self.ledger, self.config)

    def public_error(self, error: Exception) -> str:
        """What may be said of an error to whoever called; all of it is kept here."""
        kept = {"at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "error": f"{type(error).__name__}: {error}"}
        self.say(f"refused or failed: {kept['error']}")
        try:
            atomic_write(self.folder / LAST_ERROR, json.dumps(kept, indent=2) + "\n")
        except OSError:
            self.say("and this could not be written down: the disk may be full")
        if isinstance(error, BudgetError):  # an exact epsilon would tell how many records there are
            return f"BudgetError: the budget of {self.config.name} does not pay for it; its owner sees by how much"
        if isinstance(error, TELLS):
            return f"{type(error).__name__}: {error}"
        return "the order could not be carried out; the site's own people see why (ficpd site status)"

    def close(self) -> None:
        self.ledger.close()
        self._held.close()

    def _run_folder(self, name: str) -> Path:
        """Of a run; its name comes from outside, and no path does."""
        if not re.fullmatch(r"[0-9a-f]{1,64}", name):
            raise CodecError(f"the run's name is {name[:80]!r}, expected at most 64 hexadecimal digits")
        return self.folder / RUNS / name

    def _witness(self) -> None:
        """How many orders were carried out, told beside the ledger: an older copy of the ledger would not know."""
        atomic_write(self.folder / WITNESS, f"{self.ledger.num_assignments()}\n")

    def _check_witness(self) -> None:
        file, found = self.folder / WITNESS, self.ledger.num_assignments()
        written = file.read_text().strip() if file.exists() else "0"
        if not written.isdecimal():
            self.ledger.close()
            raise LedgerError(
                f"{file} cannot be read: {written[:20]!r} is no number of orders. Restore it, and the ledger, from one copy"
            )
        if (known := int(written)) > found:
            self.ledger.close()
            raise LedgerError(
                f"{self.folder / LEDGER} knows of {found} orders, and {known} were carried out: it is an older copy, or "
                "its -wal file is missing. What was spent since is spent: restore the newest copy of both"
            )


def _owned(folder: Path) -> None:
    """A folder that nobody else may look into. Raises `SiteError` if it is somebody else's."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = folder.stat()
    if about.st_uid != os.geteuid():
        raise SiteError(
            f"{folder} belongs to user {about.st_uid}, this process is user {os.geteuid()}; run as its owner, or set `state`"
        )
    if about.st_mode & 0o077:
        folder.chmod(0o700)


def _hold(folder: Path):
    """The state's lock, as long as this process lives."""
    file = open(folder / "lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise SiteError(f"another process works with {folder}; two would spend one budget. Stop the other") from error
    return file


def _own_seed(file: Path) -> int:
    """Drawn from the operating system once: which records are held back must stay the same over restarts."""
    if not file.exists():
        atomic_write(file, f"{secrets.randbits(62)}\n")
        file.chmod(0o600)
    return int(file.read_text())
