"""Shows the releases of each site, their guarantee, and the audit."""

import math
import shlex
from collections import Counter

from pydantic import TypeAdapter

from ficpd.errors import RunError
from ficpd.evaluation.audit.report import Audit, table, verdict
from ficpd.evaluation.metrics import Metric
from ficpd.experiments.finished import FinishedRun
from ficpd.experiments.report import figures
from ficpd.experiments.report.blocks import Block, Figure, KeyValues, Section, Table, Text
from ficpd.experiments.report.summary import format_bytes, format_noise_multipliers
from ficpd.experiments.results import PrivacyReport
from ficpd.library.card import ONE_RECORD, describe_group_costs

MOST = 200
"""The maximum number of clients in the figure: those that spent most."""
EPSILON = Metric("ε")
SCALE = ".scale"
ITEMS = {
    "delta": "change of the prompt",
    "gradient": "clipped gradients, summed",
    "classes": "class totals: sums of features by label",
    "labels": "how many records have each label",
    "words": "words of the prompt",
    "logits": "logits by label",
    "losses_1K": "losses of candidate prompts",
    "slopes_SK": "slopes along random directions",
    "mean_1N": "the search's mean",
    "loss": "its loss",
    "sigmas": "the search's step sizes",
}
"""Describes the methods' arrays."""
UNITS = {
    "record": ONE_RECORD,
    "subject": "one subject, all of its records at one site together",
    "client": "one client, all of its records together",
}
UNCOVERED = (
    "that a site takes part, when, and how long its messages are; its public card; one person's records at other sites; "
    "further runs on the same records, unless the same ledger counts them. Scores, counts, personal prompts and baselines "
    "of this page are a simulation's own view: they do not leave a site, and `ficpd publish` does not copy them"
)


# ---------------------------------------------------------------- what left


def left(run: FinishedRun) -> Section:
    """Describes the run's messages for a data protection officer."""
    own, privacy = run.result, run.result.privacy
    sizes = own.bytes
    total = (sizes.up_total + sizes.down_total) / max(own.num_clients, 1)
    pairs = [
        ("sent by a site", f"{format_bytes(sizes.up_per_client_round)} a round"),
        (
            "sent to a site",
            f"{format_bytes(sizes.down_per_client_round)} a round; {format_bytes(total)} in all, both ways",
        ),
        ("records", "no text, image or label is in a message; the arrays above are computed from them"),
        *_guarantee(privacy),
        (
            "not covered",
            UNCOVERED if privacy.epsilon is not None else "everything: no guarantee bounds what messages reveal",
        ),
        ("audited", _audited(run)),
    ]
    blocks: list[Block] = [*_items(run), KeyValues(pairs)]
    if privacy.noise == "simulated":
        blocks.insert(0, Text(
            "Simulated noise: it comes from the experiment's seed, and the seed is enough to remove it. "
            'Release nothing of this run; a real one has privacy.noise = "cryptographic".', alarm=True,
        ))  # fmt: skip
    if privacy.lines:
        blocks += [_lines(privacy), *_sites(privacy)]
    return Section("privacy", "What left each site", blocks)


def _items(run: FinishedRun) -> list[Table]:
    """Lists the arrays of a site's messages."""
    rounds, sizes = Counter[str](), {}
    for done in run.rounds.get(run.result.label, []):
        rounds.update(done.items.keys())
        sizes |= done.items
    cells = [
        [ITEMS.get(name, name), format_bytes(math.prod(sizes[name]) / 8 + (4 if name + SCALE in sizes else 0)),
         f"{sizes[name][0]:,}", str(sizes[name][1]), str(number)]
        for name, number in rounds.items() if not name.endswith(SCALE)
    ]  # fmt: skip
    heads = ["item", "size", "numbers", "bits each", "in rounds"]
    return [Table("The arrays of a site's message", heads, cells)] if cells else []


def _guarantee(privacy: PrivacyReport) -> list[tuple[str, str]]:
    """Describes the guarantee: figures, meaning, unit, noise and budget."""
    if privacy.epsilon is None or privacy.delta is None:
        return [("guarantee", "none: messages carry no guarantee")]
    if privacy.noise is None:
        return [("guarantee", "none is needed: nothing leaves a site")]
    unit, spent = privacy.unit, privacy.epsilon
    what = f"ε = {spent:.3f}, δ = {privacy.delta:g}, per {unit}, by {privacy.mechanism}"
    factor = math.exp(min(spent, 700))
    words = (
        f"with or without one {unit}, the probability of any conclusion from the messages differs at most by the "
        f"factor {factor:,.1f} (e to the ε) and by {_one_in(privacy.delta)} (δ)"
    )
    if privacy.at_most:
        agreed = f"agreed, at most {what}. A site's ledger has the spent budget (ficpd site status)"
        return [("guarantee", agreed), ("in words", words), ("unit", UNITS[unit]), ("noise", f"{privacy.noise}")]
    unit_said = UNITS[unit] + (f"; {describe_group_costs(privacy.group_epsilon)}" if privacy.group_epsilon else "")
    if privacy.group_epsilon:
        unit_said += ". data.columns.subject makes the person the unit"
    if privacy.max_records_per_subject is not None:
        unit_said += f". At most {privacy.max_records_per_subject} records of a subject are in a step"
    if privacy.replace_epsilon is not None:
        unit_said += (
            f". ε is for one more or less; it is {privacy.replace_epsilon:.3f} for one {unit} replaced by another"
        )
    budget = "no budget was set"
    if privacy.budget is not None:
        budget = f"{max(privacy.budget - spent, 0.0):.3f} of {privacy.budget:g}, of the client that spent most"
    clip = "–" if privacy.clip_norm is None else f"{privacy.clip_norm:.3g}"
    noise = f"{privacy.noise}; clip norm {clip}, noise multipliers {format_noise_multipliers(privacy)}"
    return [
        ("guarantee", f"{what} ({privacy.neighbouring}; counted by {privacy.accountant})"),
        ("in words", words),
        ("unit", unit_said),
        ("noise", noise),
        ("budget left", budget),
    ]


def _one_in(delta: float) -> str:
    """
    >>> _one_in(1e-5), _one_in(0)
    ('1 in 100,000', 'nothing')
    """
    return f"1 in {round(1 / delta):,}" if delta else "nothing"


def _audited(run: FinishedRun) -> str:
    found = _audit_of(run)
    attack = f"no. `ficpd audit {shlex.quote(str(run.directory))}` attacks the library and tests its ε"
    return attack if found is None else verdict(found)


def _lines(privacy: PrivacyReport) -> Table:
    heads = ["line", "releases", "sampling rate", "noise multiplier", "ε alone", "share"]
    cells = [
        [line.name, f"{line.releases:,}", f"{line.sampling_rate:.3g}", f"{line.noise_multiplier:.3g}",
         f"{line.epsilon_alone:.3f}", f"{100 * line.share:.0f} %"]
        for line in privacy.lines
    ]  # fmt: skip
    return Table(f"The privacy ledger of {privacy.site_that_spent_most}, the client that spent most", heads, cells)


def _sites(privacy: PrivacyReport) -> list[Block]:
    """Draws the ε of each client, unless all have spent the same."""
    spent = dict(sorted(privacy.epsilon_of_sites.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST])
    values = list(spent.values())
    if len(spent) < 2:
        return []
    if max(values) - min(values) < 0.005 * max(values):
        return [Text(f"All {len(privacy.epsilon_of_sites)} clients have spent the same.")]
    budget = privacy.budget
    said = "ε of everything that it released." + (" Dashed: the budget." if budget else "")
    drawn = figures.dots("sites", "What each client spent", said, list(spent), {"ε": values}, EPSILON, line=budget)
    size = {"height": 90 + 24 * len(spent), "xaxis_range": [0, 1.08 * max(*values, budget or 0.0)]}
    drawn.plot.update_layout(size).update_traces(marker_size=9)
    return [drawn]


# ---------------------------------------------------------------- the audit


def _audit_of(run: FinishedRun) -> Audit | None:
    """Reads the run's audit; None without one. Raises `RunError` for an invalid file."""
    file = run.directory / "audit.json"
    if not file.exists():
        return None
    try:
        return TypeAdapter(Audit).validate_json(file.read_bytes())
    except ValueError as error:
        raise RunError(
            f"{file} cannot be read as an audit ({error!r}); run `ficpd audit` again, or delete it"
        ) from error


def audit(run: FinishedRun) -> Section | None:
    found = _audit_of(run)
    if found is None:
        return None
    heads, cells = table(found)
    attacks = Table("Which records were in the training data? (95 % intervals)", heads, cells)
    said = (
        f"Attacked: the prompt {found.prompt} of a run of {found.method}, with {found.num_members:,} records that were "
        f"trained on and {found.num_nonmembers:,} that were not; {found.num_shadows} shadow prompts. Privacy of the run: "
        f"{found.guarantee}."
    )
    blocks: list[Block] = [Text(verdict(found), found.alarm), Text(said), _attacks(found), attacks]
    return Section("audit", "The audit", [*blocks, *_bounds(found)])


def _attacks(found: Audit) -> Figure:
    said = "AUC of each attack with its 95 % interval. Dashed: 0.5, a random guess; 1 is a perfect attack."
    of = found.attacks.values()
    series, ends = {"AUC": [outcome.auc for outcome in of]}, [outcome.auc_interval for outcome in of]
    title = "How well attacks find the members"
    return figures.dots("attacks", title, said, list(found.attacks), series, Metric("AUC"), ends, 0.5)


def _bounds(found: Audit) -> list[Block]:
    if not found.bounds:
        return []
    heads = ["canaries", "ε is at least", "ε stated", "δ", "most that could be shown", "runs or canaries"]
    cells = [
        [name, f"{b.epsilon:.2f}", "none" if b.stated is None else f"{b.stated:.2f}", f"{b.delta:.2g}", f"{b.reach:.2f}",
         f"{b.runs:,}"]
        for name, b in found.bounds.items()
    ]  # fmt: skip
    said = (
        "Canaries are records that are easy to detect. Their detection bounds ε from below, with 95 % confidence each: one "
        "correct run in twenty may exceed the stated ε by chance."
    )
    return [Table("Is ε as stated?", heads, cells), Text(said)]
