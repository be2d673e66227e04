"""Reads a site's status for its owner. A server never sees it."""

import json
from collections.abc import Sequence

from ficpd.data.subjects import UnitCounts
from ficpd.deployment.site.config import SiteConfig
from ficpd.privacy.ledger import Budget, Ledger, Unit
from ficpd.types import JSON

RUNS, LAST_ERROR = "runs", "last-error.json"


def ledger_status(ledger: Ledger, config: SiteConfig) -> dict[str, JSON]:
    """Reads budget, runs and the last error from the ledger and the state folder."""
    allowed = config.policy
    units = ledger.units(config.name)
    account, runs, error = ledger.account(config.name, Budget(None, allowed.delta)), {}, config.state / LAST_ERROR
    for folder in sorted((config.state / RUNS).glob("*")):
        of_run, scores = ledger.account(config.name, account.budget, folder.name), folder / "scores.json"
        runs[folder.name] = {
            "rounds_served": of_run.num_assignments(),
            "last_assignment": of_run.last_assignment_at(),
            "scores": json.loads(scores.read_text(encoding="utf-8")) if scores.exists() else {},
        }
    spent = account.epsilon() if account.spent() else 0.0
    return {
        "name": config.name,
        "rehearsal": config.simulation is not None,
        "epsilon": {"spent": spent, "of": allowed.epsilon, "delta": allowed.delta, "unit": _described(units)},
        "runs": runs,
        "last_error": json.loads(error.read_text(encoding="utf-8")) if error.exists() else None,
    }


def check_data_unit(ledger: Ledger, config: SiteConfig, counts: UnitCounts) -> None:
    """Raises `LedgerError` if earlier runs were charged per record and the data name subjects, or the reverse."""
    unit = "record" if counts.subjects is None else "subject"
    if {found.name for found in ledger.units(config.name)} & {"record", "subject"}:
        ledger.check_unit(config.name, unit)


def _described(units: Sequence[Unit]) -> str | None:
    """Describes the privacy unit of the costs; None if nothing was spent."""
    if not units:
        return None
    most = [unit.max_records_per_subject for unit in units if unit.max_records_per_subject is not None]
    return f"{units[0].name} (at most {max(most)} of its records in a step)" if most else units[0].name
