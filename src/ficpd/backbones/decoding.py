"""Writes token by token with any decoder that gives logits: picks the next token and ends texts."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ficpd import rng
from ficpd.backbones.devices import copy_to
from ficpd.errors import BackboneError

TOP_P = 0.95
"""The probability of the smallest set that tokens are drawn from (Holtzman et al., ICLR 2020, arXiv 1904.09751). The
many unlikely tokens would spoil a text."""

Step = Callable[[Tensor | None], Tensor]
"""Maps the S last tokens (None at first) to the logits [S, V] of the next ones."""
Pick = Callable[[Tensor], Tensor]
"""Maps logits [S, V] to the chosen tokens [S], on their device."""
TOKENS_BETWEEN_CHECKS = {"cpu": 1, "cuda": 16, "mps": 16}
"""The number of tokens between two checks for the end of all texts. A check waits for the GPU."""


def greedy(logits_SV: Tensor) -> Tensor:
    return logits_SV.argmax(-1)


def row_generators(texts: Sequence[str], seed: int) -> list[torch.Generator]:
    """Makes one generator per text, from the seed, the text and the number of equal texts before it.

    A row's draws do not depend on other texts, and equal texts have different draws."""
    before, found = Counter(), []
    for text in texts:
        found.append(rng.make_generator(seed, "writing", text, before[text]))
        before[text] += 1
    return found


def sampler(drawn_from: Sequence[torch.Generator], temperature: float) -> Pick:
    """Returns a `Pick` of the likeliest token (temperature 0), or of one drawn from each row's stream.

    Raises `BackboneError` for a temperature below 0.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise BackboneError(f"temperature = {temperature}: expected 0 (the likeliest token) or a positive number")
    if temperature == 0:
        return greedy

    def drawn(logits_SV: Tensor) -> Tensor:
        uniform_S = torch.stack([torch.rand((), generator=stream) for stream in drawn_from])
        return nucleus_sample(logits_SV / temperature, copy_to(uniform_S, logits_SV.device))

    return drawn


def nucleus_sample(logits_SV: Tensor, uniform_S: Tensor) -> Tensor:
    """Samples a token of each row, [S], from the likeliest `TOP_P` of its probability.

    uniform_S: positions from 0 to 1 in that set, with the likeliest token first.
    """
    sorted_SV, ids_SV = logits_SV.float().softmax(-1).sort(dim=-1, descending=True)
    below_SV = sorted_SV.cumsum(-1) - sorted_SV
    kept_SV = sorted_SV * (below_SV < TOP_P)
    place_S = uniform_S * kept_SV.sum(-1)
    reached_S = (kept_SV.cumsum(-1) <= place_S[:, None]).sum(-1)
    last_S = (kept_SV > 0).sum(-1) - 1
    return ids_SV.gather(1, reached_S.minimum(last_S)[:, None])[:, 0]


def decode(step: Step, pick: Pick, rows: int, ends: Tensor, max_tokens: int) -> list[list[int]]:
    """Returns the tokens of each row: at most `max_tokens`, up to the first of `ends` (not included).

    Raises `BackboneError` if `max_tokens` is below 0.
    """
    if max_tokens < 0:
        raise BackboneError(f"max_tokens = {max_tokens}: expected 0 or more tokens to write")
    done, chosen, written = torch.zeros(rows, dtype=torch.bool, device=ends.device), None, []
    for place in range(max_tokens):
        chosen = pick(step(chosen))
        done = done | torch.isin(chosen, ends)
        written.append(chosen.masked_fill(done, -1))
        if (place + 1) % TOKENS_BETWEEN_CHECKS[ends.device.type] == 0 and done.all():
            break
    table = torch.stack(written, 1).tolist() if written else [[]] * rows
    return [[token for token in row if token >= 0] for row in table]
