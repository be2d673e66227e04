"""The result of a privacy audit, and its page."""

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
        """Whether a lower bound is above the stated ε."""
        return any(bound.contradicts for bound in self.bounds.values())


def table(audit: Audit) -> tuple[list[str], list[list[str]]]:
    """Returns headings and cells: one attack a line, each figure with its 95% interval."""
    heads = ["attack", "AUC", "advantage", "members found, 1% accused", "members found, 0.1% accused"]
    cells = [
        [name, _figure(o.auc, o.auc_interval), _figure(o.advantage, o.advantage_interval)]
        + [_figure(o.tpr[rate], o.tpr_interval[rate]) for rate in o.tpr]
        for name, o in audit.attacks.items()
    ]
    return heads, [*cells, ["best of them", "", _figure(audit.advantage, audit.advantage_interval), "", ""]]


def verdict(audit: Audit) -> str:
    """Returns the audit's verdict in one or two sentences.

    A bound above the stated ε raises the alarm; no such bound proves nothing.
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


def markdown(audit: Audit) -> str:
    """Returns the page `audit.md`."""
    privacy = audit.guarantee if audit.delta is None else f"{audit.guarantee}, δ = {audit.delta:g}"
    return "\n".join(
        [
            f"# Audit of {audit.run}\n",
            f"**{verdict(audit)}**\n" if audit.alarm else f"{verdict(audit)}\n",
            f"Attacked: the prompt `{audit.prompt}` of a run of {audit.method}. Privacy of the run: {privacy}. "
            f"Seed {audit.seed}.\n",
            "## Can members of the training data be identified?\n",
            *_attacks(audit),
            "## Does the stated ε hold?\n",
            *_bounds(audit),
        ]
    )


def _attacks(audit: Audit) -> list[str]:
    few = (
        f"**Few non-members.** {audit.num_nonmembers} are fewer than {FEW:,}: the intervals are wide, and low false "
        "positive rates cannot be measured. Use more test records, or a run with `data.max_records`.\n"
    )
    return [
        f"{audit.num_members:,} training records (members) were mixed with {audit.num_nonmembers:,} others (non-members), "
        f"with the same label shares; each attack ranks them by their losses. {audit.num_shadows} shadow prompts, tuned "
        f"likewise on {audit.shadow_records:,} other records each, give reference losses.\n",
        *([few] if audit.num_nonmembers < FEW else []),
        *_lines(*table(audit)),
        "- AUC: how often a member is ranked above a non-member; 0.5 is chance, 1 is perfect.",
        "- advantage: the share of members accused less the share of non-members accused, at a threshold chosen on other "
        "records; 0 is chance, 1 is perfect. *best of them* also chooses the attack on other records.",
        "- members found, 1% (0.1%) accused: the share of members found while at most that share of non-members is "
        "accused; about 1% (0.1%) is chance. A few members found with certainty are a breach even if the AUC is near "
        "0.5. A dash: too few non-members to measure that share.",
        "- Brackets: intervals at 95%.\n",
    ]


def _bounds(audit: Audit) -> list[str]:
    if not audit.bounds:
        return ["No canaries were used.\n"]
    heads = ["canaries", "ε is at least", "ε stated", "δ", "largest possible bound", "runs or canaries"]
    cells = [
        [name, f"{b.epsilon:.2f}", "none" if b.stated is None else f"{b.stated:.2f}", f"{b.delta:.2g}",
         f"{b.reach:.2f}", f"{b.runs:,}"]
        for name, b in audit.bounds.items()
    ]  # fmt: skip
    return [
        "Canaries are records that are easy to detect. Their detection rate gives a lower bound on ε.\n",
        *_lines(heads, cells),
        "- the mechanism alone: clipping, sampling and noise as configured, run many times with and without the worst "
        "possible record (or client). The audit draws noise from seeds, whatever source the run used.",
        "- planted records: a second training of the federation, with each mislabelled record included at random (1/2). "
        "ε stated is that training's (twice it, with δ to match, if the server adds noise for whole clients).",
        "- ε is at least: holds with 95% confidence each. One valid run in twenty exceeds the stated ε by chance; repeat "
        "an alarm with another `--seed`.",
        "- largest possible bound: the bound if every canary were detected. An ε above it cannot be contradicted by this "
        "number of canaries.\n",
    ]


def _lines(heads: list[str], cells: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *cells]] + [""]


def _figure(value: float | None, interval: Interval | None) -> str:
    if value is None or interval is None:
        return "–"
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
