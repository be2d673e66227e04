"""Chooses the units of a client's record-level mechanism: its records, or their subjects."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ficpd.data.subjects import subject_numbers
from ficpd.errors import PrivacyError
from ficpd.interfaces import Mechanism
from ficpd.types import Record


@dataclass(frozen=True, eq=False)
class Units:
    """number: of units. largest: the largest number of records in one. subject_B: each record's subject, as a number;
    None: each record is a unit."""

    number: int
    largest: int = 1
    subject_B: Tensor | None = None

    def of(self, rows: Tensor | slice) -> dict[str, Tensor]:
        """Returns a mechanism's argument `subject_B` for these records; empty if each record is a unit."""
        return {} if self.subject_B is None else {"subject_B": self.subject_B[rows]}


def units_of(client: str, records: Sequence[Record], mechanism: Mechanism) -> Units:
    """Returns the units of a client's training records.

    Guarantees: records that name subjects never get a mechanism for single records, and other records never get one for
    subjects. Both raise `PrivacyError` (`tests/contracts/test_subject_unit.py`).
    """
    numbers = subject_numbers(records)
    if mechanism.unit == "record" and mechanism.subjects != (numbers is not None):
        raise PrivacyError(
            f"{client}: its records name {'no subjects' if numbers is None else 'subjects'}, and its mechanism was planned "
            f"for {'subjects' if mechanism.subjects else 'records'}; plan it from the counts of these records"
        )
    if not mechanism.subjects or numbers is None:
        return Units(len(records))
    subject_B = torch.tensor(numbers, dtype=torch.long)
    return Units(max(numbers) + 1, int(subject_B.bincount().max()), subject_B)
