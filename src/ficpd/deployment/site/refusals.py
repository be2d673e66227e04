"""Counts the uncharged answers about a site's budget. Each reveals a little about the number of records."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from ficpd.errors import PolicyError, SiteError
from ficpd.privacy.ledger import Ledger
from ficpd.storage import atomic_write


class Refusals:
    """Counts the run specs that the budget refused since the last charge, and stores an accepted one without a charge.

    file: a file in the site's state folder.
    name: the site's name.
    most: the maximum number of refusals.

    Guarantees: between two charges the budget refuses at most `most` specs. After an accepted spec without a charge, only
    specs that were answered before are answered (`tests/deployment/site/test_unpaid_calls.py`). Otherwise a coordinator
    could find the number of records by bisection.
    """

    def __init__(self, file: Path, name: str, most: int, ledger: Ledger):
        self.file, self.name, self.most, self.ledger = file, name, most, ledger

    def check(self, body: bytes) -> None:
        """Raises `PolicyError` for a new spec when enough were answered. A repeated spec reveals nothing new."""
        kept = self._kept()
        if sha256(body).hexdigest() in (*kept["refused"], kept["accepted"]):
            return
        if len(kept["refused"]) >= self.most or kept["accepted"]:
            raise PolicyError(
                f"{self.name} refused {len(kept['refused'])} run specs beyond its budget (its policy's max_refusals: "
                f"{self.most}), and {'one' if kept['accepted'] else 'none'} within it has paid nothing. Go on with a "
                f"run that pays, or the site's owner deletes {self.file.name} in the state folder"
            )

    def refuse(self, body: bytes) -> None:
        """Counts a spec that the budget refuses."""
        kept = self._kept()
        self._keep({**kept, "refused": sorted({*kept["refused"], sha256(body).hexdigest()})})

    def accept_unpaid(self, body: bytes) -> None:
        """Stores a spec that the budget accepts and that is not charged."""
        self._keep({**self._kept(), "accepted": sha256(body).hexdigest()})

    def _kept(self) -> dict[str, Any]:
        nothing = {"costs": self.ledger.num_costs(), "refused": [], "accepted": ""}
        if not self.file.exists():
            return nothing
        try:
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            known = {"costs": kept["costs"], "refused": list(kept["refused"]), "accepted": str(kept["accepted"])}
        except (ValueError, KeyError, TypeError) as error:
            raise SiteError(
                f"{self.file} cannot be read; its owner deletes it, and refusals count from 0 again"
            ) from error
        return known if known["costs"] == nothing["costs"] else nothing

    def _keep(self, kept: dict[str, Any]) -> None:
        atomic_write(self.file, json.dumps(kept) + "\n")
