"""CMA-ES on pycma (Hansen, "The CMA Evolution Strategy: A Tutorial", 2016, arXiv 1604.00772).

Steps are whole generations. The state is a dictionary of tensors, and a search resumed from it continues exactly. Step
sizes follow CSA, with active updates and without mirrored candidates. Above `FULL` dimensions the covariance is diagonal
(sep-CMA-ES: Ros and Hansen, PPSN 2008), because a full one learns at a rate of about 2/n². pycma draws from the given
generator and uses no global random state.
"""

import importlib
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from ficpd import rng
from ficpd.interfaces import ClientContext
from ficpd.optimizers import LocalTrainingConfig
from ficpd.optimizers.search_space import SearchSpace, regularizer
from ficpd.types import Answer, Assignment, Batch, Query

Given = ParamSpec("Given")
Result = TypeVar("Result")
black_box = True
FULL = 128
"""Largest dimension with a full covariance matrix."""


def num_candidates(training: LocalTrainingConfig) -> int:
    """Returns the candidates per record of a step."""
    return training.population


def tune(
    client: ClientContext,
    start_PD: Tensor,
    batches: Iterator[Batch],
    *,
    training: LocalTrainingConfig,
    assignment: Assignment,
    l2_weight: float = 0.0,
    proximal_weight: float = 0.0,
) -> Generator[Query, Answer, Tensor]:
    """Returns [P, D] at the mean of the last generation; each batch is one generation.

    Every assignment starts a new search around the prompt, of width `LocalTrainingConfig.apart`. Its space is the
    client's subspace, or a random one that all clients share.
    """
    space = SearchSpace(tuple(start_PD.shape), client.subspace, training.search_dimension, training.public_seed)
    search = CMAES(init_state(space.size, training.apart(assignment) * space.unit), training.population)
    for step, batch in enumerate(batches):
        random = rng.make_generator("candidates", training.public_seed, assignment.method, assignment.round, step)
        candidates_KN = search.ask(random)
        prompts_KPD = start_PD + space.lift(candidates_KN)
        answer = yield Query(prompts_KPD, batch)
        scale = spread(candidates_KN) * len(candidates_KN) ** 0.5
        fitness_K = client.private_mean(center_losses(answer.loss_KB) / scale) * scale
        fitness_K = fitness_K + regularizer(prompts_KPD, start_PD, l2_weight, proximal_weight)
        search.tell(candidates_KN, fitness_K)
    return start_PD + space.lift(search.mean)


def center_losses(loss_KB: Tensor) -> Tensor:
    """Centers each record's losses [K, B] on their mean over the candidates.

    The ranking stays, and the common part of the losses takes no share of the clip norm.
    """
    return loss_KB - sum(loss_KB) / len(loss_KB)  # the rounding of `Tensor.sum` depends on the batch size


def spread(candidates_KN: Tensor) -> float:
    """Returns the RMS distance of the candidates from their mean.

    Centered losses over it and √K are together about as long as the record's gradient, so one clip norm fits.
    """
    return float((candidates_KN - candidates_KN.mean(0)).square().mean().sqrt().clamp(min=1e-12))


# ---------------------------------------------------------------- pycma, its state in tensors


def init_state(size: int, sigma: float, full: bool | None = None) -> dict[str, Tensor]:
    """Returns the state of a new search: mean zero [size], float64. `full` None: up to `FULL` dimensions."""
    full = size <= FULL if full is None else full
    zero = torch.zeros(size, dtype=torch.float64)
    return {
        "mean": zero,
        "sigma": torch.tensor(sigma, dtype=torch.float64),
        "shape": torch.eye(size, dtype=torch.float64) if full else torch.ones(size, dtype=torch.float64),
        "path_mean": zero.clone(),
        "path_shape": zero.clone(),
        "generation": torch.tensor(0),
    }


@lru_cache(maxsize=1)
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def _one_thread(work: Callable[Given, Result]) -> Callable[Given, Result]:
    """Limits BLAS to one thread: threads gain nothing on small matrices and wait for each other on a busy machine."""

    @wraps(work)
    def alone(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with _blas().limit(limits=1, user_api="blas"):
            return work(*args, **kwargs)

    return alone


class CMAES:
    """pycma resumed from a state (see `init_state`). `parents` None: the better half of a population."""

    @_one_thread
    def __init__(self, state: Mapping[str, Tensor], population: int, parents: int | None = None):
        cma, size, self.full = _pycma(), len(state["mean"]), state["shape"].dim() == 2
        self.random, self.asked = torch.Generator().manual_seed(0), False
        options = {
            "popsize": population, "CMA_mu": parents, "CMA_diagonal": not self.full, "CMA_mirrors": 0,
            "updatecovwait": 0 if size <= FULL else None,  # pycma chooses how often to factorise a large C
            "AdaptSigma": cma.sigma_adaptation.CMAAdaptSigmaCSA, "randn": self._normal, "seed": float("nan"),
            "verbose": -9, "verb_log": 0, "verb_disp": 0,
        }  # fmt: skip
        self.pycma = cma.CMAEvolutionStrategy(np.zeros(size), float(state["sigma"]), options)
        self.pycma.mean = state["mean"].numpy().copy()
        if self.full:
            self.pycma.sm.C = state["shape"].numpy().copy()
            self.pycma.sm.update_now(-1)
            self.pycma._updateBDfromSM(self.pycma.sm)
        else:
            self.pycma.sigma_vec = cma.transformations.DiagonalDecoding(state["shape"].numpy().copy())
        self.pycma.pc = state["path_shape"].numpy().copy()
        self.pycma.adapt_sigma.initialize(self.pycma)
        self.pycma.adapt_sigma.ps = state["path_mean"].numpy().copy()
        self.pycma.countiter = int(state["generation"])
        self.pycma.mean_old, self.pycma.timer = self.pycma.mean, cma.utilities.utils.ElapsedWCTime()  # pycma reads both

    @_one_thread
    def ask(self, random: torch.Generator) -> Tensor:
        """Draws a population, [population, size] in float32, for the next `tell`."""
        self.random, self.asked = random, True
        return torch.from_numpy(np.array(self.pycma.ask())).float()

    @_one_thread
    def tell(self, candidates_KN: Tensor, losses_K: Tensor) -> "CMAES":
        """Updates the search by one generation and returns it. A loss that is not finite counts as the worst."""
        if not self.asked:
            self.pycma.ask()  # pycma requires a call of ask before tell; these candidates are discarded
        self.asked = False
        finite = torch.isfinite(losses_K)
        worst = float(losses_K.double()[finite].max()) if bool(finite.any()) else 0.0
        losses = torch.where(finite, losses_K.double(), worst).tolist()
        self.pycma.tell(list(candidates_KN.double().numpy()), losses, check_points=False)
        return self

    @property
    def sigma(self) -> float:
        return float(self.pycma.sigma)

    @property
    def mean(self) -> Tensor:
        """[size], float32."""
        return torch.tensor(self.pycma.mean).float()

    @property
    def state(self) -> dict[str, Tensor]:
        """The state from which another `CMAES` resumes."""
        found = {
            "mean": self.pycma.mean,
            "sigma": self.pycma.sigma,
            "shape": self.pycma.sm.C if self.full else self.pycma.sigma_vec.scaling,
            "path_mean": self.pycma.adapt_sigma.ps,
            "path_shape": self.pycma.pc,
        }
        tensors = {name: torch.tensor(np.asarray(value), dtype=torch.float64) for name, value in found.items()}
        return tensors | {"generation": torch.tensor(int(self.pycma.countiter))}

    def _normal(self, number: int, size: int) -> np.ndarray:
        return torch.randn(number, size, generator=self.random, dtype=torch.float64).numpy()


def _pycma() -> Any:
    """Imports pycma without its warning about a missing matplotlib."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("cma")
