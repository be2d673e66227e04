"""What was promised and paid: the privacy ledger, and the audit that attacked it."""

from pydantic import TypeAdapter

from ficpd.errors import RunError
from ficpd.evaluation.audit.report import Audit, table, verdict
from ficpd.evaluation.metrics import Metric
from ficpd.experiments.finished import FinishedRun
from ficpd.experiments.report import figures
from ficpd.experiments.report.blocks import Block, Figure, Section, Table, Text
from ficpd.experiments.report.summary import format_noise_multipliers
from ficpd.experiments.results import PrivacyReport
from ficpd.library.card import ONE_RECORD, describe_group_costs

MOST = 200
"""Members that the figure draws one by one."""
EPSILON = Metric("ε")


# ---------------------------------------------------------------- the ledger


def ledger(run: FinishedRun) -> Section | None:
    privacy = run.result.privacy
    if privacy.at_most:
        if privacy.epsilon is None:
            return None
        said = (
            f"Agreed: at most ε = {privacy.epsilon:g}, δ = {privacy.delta:g}, per {privacy.unit}. What each site "
            "has spent, its own ledger says (ficpd site status)."
        )
        if privacy.unit == "record":
            said += f" Where a site's data name no subjects, the unit is {ONE_RECORD}."
        return Section("privacy", "Privacy", [Text(said)])
    if privacy.epsilon is None:
        return Section("privacy", "Privacy", [Text("What left the clients carries no guarantee.")])
    if not privacy.lines:
        return None
    return Section("privacy", "The privacy ledger", [_promise(privacy), _lines(privacy), *_sites(privacy)])


def _promise(privacy: PrivacyReport) -> Text:
    budget = "no budget was set" if privacy.budget is None else f"of a budget of {privacy.budget:g}"
    simulated = (
        " Noise was simulated, drawn from the experiment's seed: whoever knows the seed can take it off. A real site uses "
        'privacy.noise = "cryptographic".' if privacy.noise == "simulated" else ""
    )  # fmt: skip
    return Text(
        f"ε = {privacy.epsilon:.3f} {budget}, δ = {privacy.delta:g}, by {privacy.mechanism}; the unit is one "
        f"{privacy.unit} ({privacy.neighbouring}).{_records_in_a_step(privacy)} Clip norm {privacy.clip_norm:g}, "
        f"noise multipliers {format_noise_multipliers(privacy)} ({privacy.noise} noise); counted by {privacy.accountant}. "
        "Each method of this page is a run of its own: a member that took part in several would pay for each. Test scores "
        f"are the simulation's own view: they do not leave a site.{_neighbours(privacy)}{simulated}"
    )


def _records_in_a_step(privacy: PrivacyReport) -> str:
    most = privacy.max_records_per_subject
    return "" if most is None else f" At most {most} records of a subject are in a step."


def _neighbours(privacy: PrivacyReport) -> str:
    """What the same noise gives for a replaced unit, and for somebody with several records."""
    said = ""
    if privacy.replace_epsilon is not None:
        said += (
            f" ε = {privacy.epsilon:.3f} is for one {privacy.unit} more or less. The same noise gives ε = "
            f"{privacy.replace_epsilon:.3f} for one {privacy.unit} replaced by another."
        )
    if privacy.group_epsilon:
        costs = describe_group_costs(privacy.group_epsilon)
        said += f" The unit is {ONE_RECORD}: {costs}. data.columns.subject makes the person the unit."
    return said


def _lines(privacy: PrivacyReport) -> Table:
    heads = ["line", "releases", "sampling rate", "noise multiplier", "ε alone", "share"]
    cells = [
        [line.name, f"{line.releases:,}", f"{line.sampling_rate:.3g}", f"{line.noise_multiplier:.3g}",
         f"{line.epsilon_alone:.3f}", f"{100 * line.share:.0f} %"]
        for line in privacy.lines
    ]  # fmt: skip
    return Table(f"What {privacy.site_that_spent_most}, the member that spent most, released", heads, cells)


def _sites(privacy: PrivacyReport) -> list[Figure]:
    spent = dict(sorted(privacy.epsilon_of_sites.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST])
    if len(spent) < 2:
        return []
    budget, values = privacy.budget, list(spent.values())
    said = "ε of everything that it released." + (" Dashed: the budget." if budget else "")
    drawn = figures.dots("sites", "What each member spent", said, list(spent), {"ε": values}, EPSILON, line=budget)
    size = {"height": 90 + 24 * len(spent), "xaxis_range": [0, 1.08 * max(*values, budget or 0.0)]}
    drawn.plot.update_layout(size).update_traces(marker_size=9)
    return [drawn]


# ---------------------------------------------------------------- the audit


def audit(run: FinishedRun) -> Section | None:
    file = run.directory / "audit.json"
    if not file.exists():
        return None
    try:
        found = TypeAdapter(Audit).validate_json(file.read_bytes())
    except ValueError as error:
        raise RunError(
            f"{file} cannot be read as an audit ({error!r}); run `ficpd audit` again, or delete it"
        ) from error
    heads, cells = table(found)
    attacks = Table("Can it be told who was in the training data? (95 % intervals)", heads, cells)
    said = (
        f"Attacked: the prompt {found.prompt} of a run of {found.method}, with {found.num_members:,} records that were "
        f"trained on and {found.num_nonmembers:,} that were not; {found.num_shadows} shadow prompts. Privacy of the run: "
        f"{found.guarantee}."
    )
    blocks: list[Block] = [Text(verdict(found), found.alarm), Text(said), _attacks(found), attacks]
    return Section("audit", "The audit", [*blocks, *_bounds(found)])


def _attacks(found: Audit) -> Figure:
    said = "AUC of each attack with its 95 % interval. Dashed: 0.5, a coin's flip; 1 would tell them apart."
    of = found.attacks.values()
    series, ends = {"AUC": [outcome.auc for outcome in of]}, [outcome.auc_interval for outcome in of]
    title = "How well members are told from others"
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
        "Canaries are records made to be noticed: how well their presence is noticed shows how large ε is at least, with 95 "
        "% confidence each, so one sound run in twenty may exceed what was stated by chance."
    )
    return [Table("Is ε what it is said to be?", heads, cells), Text(said)]
