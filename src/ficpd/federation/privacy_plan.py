"""A run's privacy plan: workloads, mechanisms, accounts, and their cost together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ficpd import rng
from ficpd.data.subjects import UnitCounts, count_units
from ficpd.errors import ConfigError, LedgerError, PrivacyError
from ficpd.federation.method import Method
from ficpd.federation.rounds import RoundSchedule, sample_cohort
from ficpd.federation.secure_sum import SIMULATED
from ficpd.federation.secure_sum.server import SecureSum
from ficpd.federation.secure_sum.terms import own_part
from ficpd.interfaces import Mechanism, NoiseSource, ReleaseKind
from ficpd.privacy import accountant, record_gaussian
from ficpd.privacy.central_gaussian import CentralGaussian
from ficpd.privacy.ledger import Account, Budget, Ledger, Unit
from ficpd.privacy.noise import SecureNoise, SeededNoise
from ficpd.privacy.shared_gaussian import SHARED, SharedGaussian
from ficpd.registry import build_config, load
from ficpd.types import JSON, ClientData, ClientWorkload, PrivacyCost, State

NONE = {"name": "none"}
NO_RELEASE_GUARANTEE = {"mechanism": "none is needed: nothing leaves", "unit": "record", "epsilon": 0.0, "delta": 0.0}
LEDGER = "ledger.sqlite"
SERVER = "server"


@dataclass(frozen=True)
class PrivacyPlan:
    """mechanisms, accounts: by client. central: the server's mechanism, for central noise.

    secure: the secure sum of the rounds, if clients share the noise."""

    mechanisms: Mapping[str, Mechanism]
    accounts: Mapping[str, Account]
    ledger: Ledger | None
    central: CentralGaussian | None
    releases: bool
    secure: SecureSum | None = None

    def close(self) -> None:
        if self.ledger is not None:
            self.ledger.close()

    def expected_noise_norm_sq(self, size: int) -> float | None:
        """Averages the mechanisms' `expected_noise_norm_sq` over clients."""
        known = [mechanism.expected_noise_norm_sq(size) for mechanism in self.mechanisms.values()]
        return None if None in known else sum(known) / len(known)  # type: ignore[arg-type]

    def to_report(self) -> dict[str, JSON]:
        """Makes the `privacy` block of the result: the guarantee, and the costs of the client that spent most."""
        if not self.releases:
            return {**NO_RELEASE_GUARANTEE, "noise": None}
        first = next(iter(self.mechanisms.values()))
        if first.unit == "none":
            return {**first.guarantee(), "noise": None}
        accounts = [self.central.account] if self.central else list(self.accounts.values())
        spent = {account.site: account.epsilon() for account in accounts}
        worst = max(accounts, key=lambda account: spent[account.site])
        costs = {account.site: account.spent() for account in accounts}
        multipliers = [line.noise_multiplier for lines in costs.values() for line in lines]
        delta = first.guarantee()["delta"]
        return {
            **self.mechanisms.get(worst.site, first).guarantee(),
            "epsilon": spent[worst.site],
            "noise_multiplier": [min(multipliers, default=None), max(multipliers, default=None)],
            "noise": first.noise,
            "site_that_spent_most": worst.site,
            "epsilon_of_sites": spent,
            "lines": accountant.cost_shares(costs[worst.site], delta),
            **_other_neighbours(first, costs[worst.site], delta),
        }


def _other_neighbours(mechanism: Mechanism, costs: Sequence[PrivacyCost], delta: float) -> dict[str, JSON]:
    """Computes ε of the same noise for one replaced unit, and for several records of one person.

    Local noise on clients is sized for a replacement already.
    """
    if mechanism.unit == "client":
        central = mechanism.cost(ReleaseKind.SUM) is not None
        return {"replace_epsilon": accountant.epsilon_replaced(costs, delta)} if central else {}
    found: dict[str, JSON] = {"replace_epsilon": accountant.epsilon_replaced(costs, delta)}
    return found if mechanism.subjects else found | {"group_epsilon": accountant.group_costs(costs, delta)}


def privacy_config_for(method: Method, part: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the privacy settings that apply to a method.

    They are `NONE` if it releases nothing, or if one client holds all records and the unit is the client. Raises
    `PrivacyError` if the method cannot have the guarantee.
    """
    declared, unit = method.capabilities, "record" if part.get("placement") is None else "client"
    if not declared.releases or part["name"] == "none":
        return NONE
    if not declared.private_units:
        raise PrivacyError(f"{method.name} has no private form: {declared.not_private}")
    if unit == "client" and declared.centralized:
        return NONE
    if part.get("placement") == "central" and not declared.linear:
        raise PrivacyError(
            f"privacy.placement = 'central' noises one sum of all updates, and {method.name} aggregates each client's "
            "update by itself. Use placement = 'local', privacy.name = 'record_gaussian', or a method that sums "
            "(fedavg, fedprox) with method.robust.rule = 'mean'"
        )
    if part["name"] == SHARED and declared.centralized:  # a single client has no other to share the noise with
        known = record_gaussian.Config.model_fields
        return {"name": "record_gaussian", **{key: value for key, value in part.items() if key in known}}
    if part["name"] == SHARED and (
        not declared.gradient_sum or load("optimizers", method.training.optimizer).black_box
    ):
        raise PrivacyError(
            f"privacy.name = {SHARED!r} shows the server the sum of all gradients alone, and {method.name} with "
            f"training.optimizer = {method.training.optimizer!r} needs more. Use fedavg, fedprox or ficpd with adam or sgd, "
            "and method.robust.rule = 'mean', or privacy.name = 'record_gaussian'"
        )
    if unit not in declared.private_units:
        raise PrivacyError(f"{method.name} has no private form at the {unit} level: {declared.not_private}")
    return part


def plan_privacy(
    part: Mapping[str, Any], method: Method, state: State, shards: Mapping[str, ClientData], schedule: RoundSchedule,
    seed: int, folder: Path, run: str, rounds_paid: int, groups: Sequence[str] = ("",),
) -> PrivacyPlan:  # fmt: skip
    """Plans the run, chooses the noise and opens the ledger. `groups`: names of tasks, prefixes of clients' names.

    `rounds_paid`: the last round that was released. Raises `LedgerError` if the ledger ends before it.
    """
    part = privacy_config_for(method, part)
    if part.get("placement") == "central" and schedule.accept_late:
        raise PrivacyError(
            f"federation.accept_late = {schedule.accept_late}: central noise is accounted for one round's cohort, and a "
            "late update joins another round. Set it to 0, or use placement = 'local' or privacy.name = 'record_gaussian'"
        )
    part = with_least_records(part, [count_units(shard.train).units for shard in shards.values()])
    _, config = build_config("privacy", part)
    plans = client_workloads(
        method, state, {name: count_units(shard.train) for name, shard in shards.items()}, schedule
    )
    mechanisms = {name: build_mechanism(part, name, plans[name]) for name in shards}
    first = next(iter(mechanisms.values()))
    for name in method.capabilities.statistics_once if first.unit == "record" else ():
        if first.cost(ReleaseKind.STATISTIC, name) is None:
            raise PrivacyError(
                f"{method.name} asks every client for the statistic {name!r}, which has no share of the budget; give it "
                f"one, such as privacy.statistics = {{ {name} = 0.05 }}"
            )
    for mechanism in mechanisms.values() if first.unit != "none" else ():
        accountant.check_price(mechanism.planned_costs(), config.delta)
    if first.unit == "none":
        return PrivacyPlan(mechanisms, {}, None, None, method.capabilities.releases)
    if first.unit == "client" and not method.update_spec(state):
        raise PrivacyError(
            f"client-level privacy noises updates, and {method.name} sends none. Use privacy.name = 'record_gaussian'"
        )
    if rounds_paid and not (folder / LEDGER).exists():
        raise LedgerError(
            f"{folder / LEDGER} is gone, and {rounds_paid} rounds were run: their privacy cost is unknown. Restore the "
            "file, or begin in a new directory (released updates stay released)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(folder / LEDGER, f"run {run}", rounds_paid)

    def account(site: str, mechanism: Mechanism) -> Account:
        budget = Budget.of(config.epsilon, config.delta, mechanism.planned_costs())
        return ledger.account(site, budget, unit=Unit.of(mechanism.guarantee()))

    cost = first.cost(ReleaseKind.SUM)
    if cost is None:
        accounts = {name: account(name, mechanism) for name, mechanism in mechanisms.items()}
        return PrivacyPlan(mechanisms, accounts, ledger, None, True, secure_sum(mechanisms, schedule, groups))

    def stream(round: int) -> NoiseSource:
        simulated = SeededNoise(seed, "private", SERVER, "noise", round)
        return SecureNoise() if first.noise == "cryptographic" else simulated

    expected = cost.sampling_rate * len(shards)
    central = CentralGaussian(cost, first.guarantee()["clip_norm"], expected, stream, account(SERVER, first))
    unpaid = {name: ledger.account(name, Budget(None, config.delta)) for name in mechanisms}
    return PrivacyPlan(mechanisms, unpaid, ledger, central, True)


def with_least_records(part: Mapping[str, Any], units: Sequence[int]) -> Mapping[str, Any]:
    """Sets an open `privacy.least_records` to the smallest number of units of a simulation's clients."""
    return {**part, "least_records": min(units)} if part.get("least_records", 0) is None else part


def secure_sum(
    mechanisms: Mapping[str, Mechanism], schedule: RoundSchedule, groups: Sequence[str], run: str = SIMULATED,
    masked: bool = False,
) -> SecureSum | None:  # fmt: skip
    """Returns the secure sum if the clients share the noise, else None."""
    shared = {own_part(n, groups): m for n, m in mechanisms.items() if isinstance(m, SharedGaussian)}
    if shared and schedule.accept_late:
        raise PrivacyError(
            f"federation.accept_late = {schedule.accept_late}: a late term cannot join the sum of another round. Set it to 0"
        )
    return SecureSum(run, shared, masked) if shared else None


def build_mechanism(part: Mapping[str, Any], name: str, plan: ClientWorkload, **settings: Any) -> Mechanism:
    """Builds a client's mechanism with its group's clip norm. `settings` replace privacy settings of `part`.

    Raises `ConfigError` if the records name subjects, and the mechanism protects single records.
    """
    module, config = build_config("privacy", part)
    known = {key: value for key, value in settings.items() if key in type(config).model_fields}
    mechanism = module.build(_with_group_clip_norm(config, part, name).model_copy(update=known), plan)
    if mechanism.unit == "record" and plan.num_subjects is not None and not mechanism.subjects:
        raise ConfigError(
            f"privacy.name = {part['name']!r} protects single records, and data.columns.subject names whom they are about: "
            "expected a mechanism that protects subjects (record_gaussian does), or data without that column"
        )
    return mechanism


def _with_group_clip_norm(config: Any, part: Mapping[str, Any], name: str) -> Any:
    """Sets the clip norm of the client's group, if `clip_norms` are set."""
    norms = part.get("clip_norms")
    if not norms:
        return config
    group = name.partition(".")[0]
    if group not in norms:
        raise PrivacyError(
            f"privacy.clip_norms has none for {group!r}; it has {', '.join(norms)}. State one for each group"
        )
    return config.model_copy(update={"clip_norm": norms[group]})


def client_workloads(
    method: Method, state: State, records: Mapping[str, UnitCounts], schedule: RoundSchedule
) -> dict[str, ClientWorkload]:
    """Plans each client's work from the counts of its `records` and the public cohorts. A batch counts units."""
    steps, batch_size = method.local_workload(state)
    counts = participations(schedule, list(records))
    return {
        name: ClientWorkload(
            num_records=number.records,
            sampling_rate=min(batch_size, number.units) / number.units,
            steps=steps,
            participations=counts[name],
            most_participations=max(counts.values()),
            num_clients=len(records),
            cohort_rate=min(schedule.cohort / len(records), 1.0),
            num_rounds=schedule.num_rounds,
            totals=method.capabilities.statistics_per_round,
            once={name: share for name, share in method.capabilities.statistics_once.items() if share is not None},
            num_subjects=number.subjects,
        )
        for name, number in records.items()
    }


def participations(schedule: RoundSchedule, names: Sequence[str]) -> dict[str, int]:
    """Counts the rounds of each client. Cohorts come from a public seed."""
    counts = dict.fromkeys(names, 0)
    for round in range(1, schedule.num_rounds + 1):
        for name in sample_cohort(schedule, names, round):
            counts[name] += 1
    return counts


def public_seed(seed: int) -> int:
    """Derives the public seed. No private stream can be derived from it."""
    return rng.derive_seed(seed, "public")


def private_seed(seed: int, client: str) -> int:
    return rng.derive_seed(seed, "private", client)
