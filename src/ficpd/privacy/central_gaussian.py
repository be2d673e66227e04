"""Client-level privacy at the server: noises the sum of a Poisson cohort (McMahan et al., ICLR 2018, arXiv 1710.06963)."""

from collections.abc import Callable, Sequence

import torch

from ficpd import storage
from ficpd.privacy.clipping import clipped_sum
from ficpd.privacy.ledger import Account
from ficpd.rng import NoiseSource
from ficpd.types import ClientUpdate, PrivacyCost, State, UpdateSpec, zero_update

EVERYBODY = "everybody"


class CentralGaussian:
    """Replaces a round's updates by one noisy mean. `linear` methods aggregate it as one client's update.

    Guarantees: one client more or less moves the sum by at most `clip_norm`, whatever it sent; the noise has deviation
    `noise_multiplier · clip_norm`; the divisor is the expected cohort, also for an empty one
    (`tests/privacy/test_central_gaussian.py`).
    """

    def __init__(
        self, cost: PrivacyCost, clip_norm: float, expected_cohort: float, stream: Callable[[int], NoiseSource],
        account: Account,
    ):  # fmt: skip
        self.cost, self.clip_norm, self.expected_cohort = cost, clip_norm, expected_cohort
        self.stream, self.account = stream, account
        self._noise: NoiseSource | None = None

    def sample_cohort(self, names: list[str], round: int) -> list[str]:
        """Draws each client independently. Raises `BudgetError` if the budget does not allow another round."""
        self.account.check_budget([self.cost])
        self._noise = self.stream(round)
        return [names[i] for i in self._noise.poisson_sample(len(names), self.cost.sampling_rate).tolist()]

    def noisy_mean(self, updates: Sequence[ClientUpdate], layout: UpdateSpec, round: int, method: str) -> ClientUpdate:
        """Returns the noisy mean as one update of weight 1, after the ledger has committed it."""
        assert self._noise is not None, "the cohort is drawn first, from the same stream"
        shapes = {name: zeros.shape for name, zeros in sorted(zero_update(layout).items())}
        names, sizes = list(shapes), [shape.numel() for shape in shapes.values()]
        rows = [torch.cat([update.arrays[name].flatten() for name in names]) for update in updates]
        stacked = torch.stack(rows) if rows else torch.zeros(0, sum(sizes))
        summed = clipped_sum(stacked, self.clip_norm)
        noised = self._noise.add_gaussian(summed, self.cost.noise_multiplier * self.clip_norm) / self.expected_cohort
        arrays = {n: part.view(shapes[n]) for n, part in zip(names, noised.split(sizes), strict=True)}
        self.account.commit(round, method, [self.cost], storage.encode_state(State(arrays), {}))
        return ClientUpdate(EVERYBODY, arrays)

    def expected_noise_norm_sq(self, size: int) -> float:
        """Returns the expected squared norm of `size` noise values of a round's sum, before the division."""
        return size * (self.cost.noise_multiplier * self.clip_norm) ** 2

    def stored_mean(self, round: int, method: str) -> ClientUpdate | None:
        """Returns the committed mean of an earlier attempt at this round, to use it again."""
        stored = self.account.stored_update(round, method)
        return None if stored is None else ClientUpdate(EVERYBODY, storage.decode_state(stored, own=True)[0].arrays)
