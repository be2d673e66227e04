"""The result of a privacy audit, its table and its verdict."""

from collections.abc import Mapping
from dataclasses import dataclass

from ficpd.evaluation.audit.attack_metrics import AttackMetrics, Interval

FEW = 1000
"""The minimum number of non-members to measure a false positive rate of 0.1%."""


@dataclass(frozen=True)
class LowerBound:
    """A lower bound on the true ε at `delta`, with 95% confidence.

    epsilon: the bound.
    stated: the ε of the guarantee for the same unit and `delta`; None without one.
    reach: the largest bound that this many `runs` (or canaries) could give.
    """

    epsilon: float
    stated: float | None
    delta: float
    reach: float
    runs: int

    @property
    def contradicts(self) -> bool:
        return self.stated is not None and self.epsilon > self.stated


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    guarantee: the run's privacy in a phrase; `epsilon` is its ε (None: no privacy).
    mechanism: the bound from canaries against the mechanism alone; None: not computed.
    planted: the bound from canaries in a second training of the run; None: not computed.
    """

    run: str
    method: str
    prompt: str
    guarantee: str
    epsilon: float | None
    delta: float | None
    num_members: int
    num_nonmembers: int
    num_shadows: int
    shadow_records: int
    attacks: Mapping[str, AttackMetrics]
    advantage: float
    advantage_interval: Interval
    mechanism: LowerBound | None
    planted: LowerBound | None
    seed: int

    @property
    def bounds(self) -> dict[str, LowerBound]:
        found = {"the mechanism alone": self.mechanism, "planted records": self.planted}
        return {name: bound for name, bound in found.items() if bound is not None}

    @property
    def alarm(self) -> bool:
        """Tells whether a lower bound is above the stated ε."""
        return any(bound.contradicts for bound in self.bounds.values())


def table(audit: Audit) -> tuple[list[str], list[list[str]]]:
    """Returns headings and cells: one attack a row, each figure with its 95% interval."""
    heads = ["attack", "AUC", "advantage", "members found, 1% accused", "members found, 0.1% accused"]
    cells = [
        [name, _figure(o.auc, o.auc_interval), _figure(o.advantage, o.advantage_interval)]
        + [_figure(o.tpr[rate], o.tpr_interval[rate]) for rate in o.tpr]
        for name, o in audit.attacks.items()
    ]
    return heads, [*cells, ["best of them", "", _figure(audit.advantage, audit.advantage_interval), "", ""]]


def verdict(audit: Audit) -> str:
    """Returns the audit's verdict in one or two sentences.

    A bound above the stated ε raises the alarm. The absence of such a bound proves nothing.
    """
    broken = {name: bound for name, bound in audit.bounds.items() if bound.contradicts}
    if broken:
        found = "; ".join(
            f"{name}: ε is at least {b.epsilon:.2f}, {b.stated:.2f} was stated" for name, b in broken.items()
        )
        return f"ALARM: the stated privacy does not hold ({found}). Do not release the library."
    if audit.epsilon is None:
        return "This run has no privacy: there is no stated ε to compare with. Members may be found."
    if not audit.bounds:
        return "No canaries were used: the stated ε was not tested."
    return "No contradiction found. This is not a proof: a better attack may exist."


def _figure(value: float | None, interval: Interval | None) -> str:
    if value is None or interval is None:
        return "–"
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
