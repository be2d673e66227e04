"""What an audit found, and its page: for a person who has to decide whether a library may leave the house."""

from collections.abc import Mapping
from dataclasses import dataclass

from ficpd.evaluation.audit.attack_metrics import AttackMetrics, Interval

FEW = 1000
"""With fewer non-members than this, a false positive rate of 0.1% is not seen."""


@dataclass(frozen=True)
class LowerBound:
    """`epsilon`: the true ε at `delta` is at least this, with 95% confidence. `stated`: the ε that was promised to the
    same unit at the same `delta`; None: none was. `reach`: the most that this many `runs` (or canaries) could show."""

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
    """`guarantee`: the run's privacy in a phrase, `epsilon` its ε (None: no privacy). `mechanism`: the bound from canaries
    played against the mechanism alone; `planted`: from canaries in a second training of the run. None: not done."""

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
        """Whether a lower bound is above what was stated."""
        return any(bound.contradicts for bound in self.bounds.values())


def table(audit: Audit) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: an attack a line, each figure with its interval at 95%."""
    heads = ["attack", "AUC", "advantage", "members found, 1% accused", "members found, 0.1% accused"]
    cells = [
        [name, _figure(o.auc, o.auc_interval), _figure(o.advantage, o.advantage_interval)]
        + [_figure(o.tpr[rate], o.tpr_interval[rate]) for rate in o.tpr]
        for name, o in audit.attacks.items()
    ]
    return heads, [*cells, ["best of them", "", _figure(audit.advantage, audit.advantage_interval), "", ""]]


def verdict(audit: Audit) -> str:
    """The audit in one or two sentences.

    A bound that exceeds what was stated raises the alarm; that none does proves nothing.
    """
    broken = {name: bound for name, bound in audit.bounds.items() if bound.contradicts}
    if broken:
        found = "; ".join(
            f"{name}: ε is at least {b.epsilon:.2f}, {b.stated:.2f} was stated" for name, b in broken.items()
        )
        return f"ALARM: the privacy that was stated does not hold ({found}). Do not release the library."
    if audit.epsilon is None:
        return "This run has no privacy: there is no upper bound to compare anything with. Members may be found."
    if not audit.bounds:
        return "No canaries were played: the stated ε was not put to the test."
    return "No contradiction found: this is no proof, for a better attack may exist."


def markdown(audit: Audit) -> str:
    """`audit.md`: one page that needs no other."""
    return "\n".join(
        [
            f"# Audit of {audit.run}\n",
            f"{_emphasised(audit)}\n",
            f"Attacked: the prompt `{audit.prompt}` of a run of {audit.method}. Privacy of the run: {_privacy(audit)}. "
            f"Seed {audit.seed}.\n",
            "## Can it be told who was in the training data?\n",
            *_attacks(audit),
            "## Is ε what it is said to be?\n",
            *_bounds(audit),
        ]
    )


def _emphasised(audit: Audit) -> str:
    return f"**{verdict(audit)}**" if audit.alarm else verdict(audit)


def _privacy(audit: Audit) -> str:
    return audit.guarantee if audit.delta is None else f"{audit.guarantee}, δ = {audit.delta:g}"


def _attacks(audit: Audit) -> list[str]:
    few = (
        f"**Few non-members.** {audit.num_nonmembers} are fewer than {FEW:,}: the intervals are wide, and low shares of "
        "falsely accused cannot be seen. More test records, or a run with `data.max_records`, would help.\n"
    )
    return [
        f"{audit.num_members:,} records that were trained on and {audit.num_nonmembers:,} that were not, with the same "
        f"share of each label, were mixed; each attack ranks them by their losses. {audit.num_shadows} shadow prompts, "
        f"tuned in the same way on {audit.shadow_records:,} other records each, show what is usual.\n",
        *([few] if audit.num_nonmembers < FEW else []),
        *_lines(*table(audit)),
        "- AUC: how often a member is ranked above a non-member; 0.5 is a coin's flip, 1 tells them apart.",
        "- advantage: the share of members accused less the share of non-members accused, at a threshold chosen on other "
        "records; 0 is nothing learned, 1 everything. *best of them* also chooses the attack on other records.",
        "- members found, 1% (0.1%) accused: the share of members that can be named while at most that share of "
        "non-members is accused; about 1% (0.1%) is nothing learned. Few records named for sure is a breach for those "
        "few, even where the AUC is near 0.5. A dash: too few non-members to see that share.",
        "- In brackets: intervals at 95%.\n",
    ]


def _bounds(audit: Audit) -> list[str]:
    if not audit.bounds:
        return ["No canaries were played.\n"]
    heads = ["canaries", "ε is at least", "ε stated", "δ", "most that could be shown", "runs or canaries"]
    cells = [
        [name, f"{b.epsilon:.2f}", "none" if b.stated is None else f"{b.stated:.2f}", f"{b.delta:.2g}",
         f"{b.reach:.2f}", f"{b.runs:,}"]
        for name, b in audit.bounds.items()
    ]  # fmt: skip
    return [
        "Canaries are records made to be noticed. How well their presence is noticed shows how large ε is at least.\n",
        *_lines(heads, cells),
        "- the mechanism alone: clipping, sampling and noise as configured, played many times with the worst record (or "
        "client) there can be and without it. Noise is drawn from seeds here, also where the run drew it elsewhere.",
        "- planted records: the federation was trained once more, with mislabelled records put in by the flip of a coin. "
        "ε stated is that second training's (twice it, with δ to match, where the server adds noise for whole clients).",
        "- ε is at least: holds with 95% confidence each, so one sound run in twenty may exceed what was stated by chance; "
        "repeat an alarm with another `--seed`.",
        "- most that could be shown: what the bound would be if every canary had been noticed. An ε above that cannot be "
        "contradicted by so few.\n",
    ]


def _lines(heads: list[str], cells: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *cells]] + [""]


def _figure(value: float | None, interval: Interval | None) -> str:
    if value is None or interval is None:
        return "–"
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
