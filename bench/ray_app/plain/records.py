"""Random records, the same for the plain app and for ours."""

import torch

CLASSES, VIRTUAL, RECORDS = 2, 10, 80
WORDS = (1000, 30000)
LENGTHS = (22, 43)
"""Tokens of a record, 32 on average; with the virtual ones about 42."""


def records_of(client: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """`RECORDS` records of a client: the token ids of each, and their classes."""
    random = torch.Generator().manual_seed(client)
    lengths = torch.randint(*LENGTHS, (RECORDS,), generator=random).tolist()
    tokens = [torch.randint(*WORDS, (length,), generator=random) for length in lengths]
    return tokens, torch.randint(CLASSES, (RECORDS,), generator=random)
