"""A site's status for its owner. A server never sees it."""

import json

from ficpd.deployment.site.config import SiteConfig
from ficpd.privacy.ledger import Budget, Ledger
from ficpd.types import JSON

RUNS, LAST_ERROR = "runs", "last-error.json"


def ledger_status(ledger: Ledger, config: SiteConfig) -> dict[str, JSON]:
    """Reads budget, runs and the last error from the ledger and the state folder."""
    allowed = config.policy
    account, runs, error = ledger.account(config.name, Budget(None, allowed.delta)), {}, config.state / LAST_ERROR
    for folder in sorted((config.state / RUNS).glob("*")):
        of_run, scores = ledger.account(config.name, account.budget, folder.name), folder / "scores.json"
        runs[folder.name] = {
            "rounds_served": of_run.num_assignments(),
            "last_assignment": of_run.last_assignment_at(),
            "scores": json.loads(scores.read_text()) if scores.exists() else {},
        }
    spent = account.epsilon() if account.spent() else 0.0
    return {
        "name": config.name,
        "rehearsal": config.simulation is not None,
        "epsilon": {"spent": spent, "of": allowed.epsilon, "delta": allowed.delta},
        "runs": runs,
        "last_error": json.loads(error.read_text()) if error.exists() else None,
    }
