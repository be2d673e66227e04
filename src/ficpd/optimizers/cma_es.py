"""CMA-ES on pycma (Hansen, "The CMA Evolution Strategy: A Tutorial", 2016, arXiv 1604.00772), asked and told in whole
generations, its state as tensors: whatever goes on from them goes on as if it had never stopped.

Step sizes by CSA, active updates, no mirrored candidates. From `FULL` dimensions on, the covariance is diagonal
(sep-CMA-ES: Ros and Hansen, PPSN 2008): a full one learns at a rate of about 2/n², which in tens of generations is nothing.
No global random state: pycma draws from the generator that it is given."""

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
"""Up to so many dimensions the covariance is a full matrix."""


def num_candidates(training: LocalTrainingConfig) -> int:
    """Candidates about each record of a step."""
    return training.population


def tune(
    client: ClientContext,
    start_PD: Tensor,
    batches: Iterator[Batch],
    *,
    training: LocalTrainingConfig,
    order: Assignment,
    l2_weight: float = 0.0,
    proximal_weight: float = 0.0,
) -> Generator[Query, Answer, Tensor]:
    """[P, D] at the mean of the last generation; a batch is a generation. It begins anew in every order, around the prompt
    and as wide as the rate of the round (`Training.apart`), in coordinates or in a random subspace that all clients
    share."""
    space = SearchSpace(tuple(start_PD.shape), client.subspace, training.search_dimension, training.public_seed)
    search = CMAES(init_state(space.size, training.apart(order) * space.unit), training.population)
    for step, batch in enumerate(batches):
        random = rng.make_generator("candidates", training.public_seed, order.method, order.round, step)
        candidates_KN = search.ask(random)
        prompts_KPD = start_PD + space.lift(candidates_KN)
        answer = yield Query(prompts_KPD, batch)
        scale = spread(candidates_KN) * len(candidates_KN) ** 0.5
        fitness_K = client.private_mean(center_losses(answer.loss_KB) / scale) * scale
        fitness_K = fitness_K + regularizer(prompts_KPD, start_PD, l2_weight, proximal_weight)
        search.tell(candidates_KN, fitness_K)
    return start_PD + space.lift(search.mean)


def center_losses(loss_KB: Tensor) -> Tensor:
    """[K, B]: each record's losses around their mean over the candidates. Which candidate is better does not change, and
    what all have in common, which is most of a loss, needs no room in a clip norm. The mean is added up candidate by
    candidate: a sum over a dimension is rounded by how many records stand beside."""
    return loss_KB - sum(loss_KB) / len(loss_KB)


def spread(candidates_KN: Tensor) -> float:
    """How far candidates are from their mean, per number: centred losses over this and √K are about as long together as the
    record's gradient, so that a clip norm for gradients fits them."""
    return float((candidates_KN - candidates_KN.mean(0)).square().mean().sqrt().clamp(min=1e-12))


# ---------------------------------------------------------------- pycma, its state in tensors


def init_state(size: int, sigma: float, full: bool | None = None) -> dict[str, Tensor]:
    """A search that has not begun: mean zero, [size]. All float64 but the generation. `full` None: up to `FULL`
    dimensions."""
    full = size <= FULL if full is None else full
    zero = torch.zeros(size, dtype=torch.float64)
    shape = torch.eye(size, dtype=torch.float64) if full else torch.ones(size, dtype=torch.float64)
    return {
        "mean": zero,
        "sigma": torch.tensor(sigma, dtype=torch.float64),
        "shape": shape,
        "path_mean": zero.clone(),
        "path_shape": zero.clone(),
        "generation": torch.tensor(0),
    }


@lru_cache(maxsize=1)
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def _one_thread(work: Callable[Given, Result]) -> Callable[Given, Result]:
    """On matrices of this size many threads win nothing, and on a busy machine they wait for each other: 208 ms a generation
    of 48 dimensions where one thread took 8."""

    @wraps(work)
    def alone(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with _blas().limit(limits=1, user_api="blas"):
            return work(*args, **kwargs)

    return alone


class CMAES:
    """pycma at a state (see `begun`). `parents` None: the better half of a population."""

    @_one_thread
    def __init__(self, state: Mapping[str, Tensor], population: int, parents: int | None = None):
        cma, size, self.full = _pycma(), len(state["mean"]), state["shape"].dim() == 2
        self.random, self.asked = torch.Generator().manual_seed(0), False
        options = {
            "popsize": population, "CMA_mu": parents, "CMA_diagonal": not self.full, "CMA_mirrors": 0,
            "updatecovwait": 0 if size <= FULL else None,  # a large C is factorised as seldom as pycma thinks fit
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
        self.pycma.mean_old, self.pycma.timer = self.pycma.mean, cma.utilities.utils.ElapsedWCTime()  # read, never used

    @_one_thread
    def ask(self, random: torch.Generator) -> Tensor:
        """[population, size], float32, as they may travel; `tell` gets these same ones."""
        self.random, self.asked = random, True
        return torch.from_numpy(np.array(self.pycma.ask())).float()

    @_one_thread
    def tell(self, candidates_KN: Tensor, losses_K: Tensor) -> "CMAES":
        """One generation further; itself. A loss that is not finite counts like the worst."""
        if not self.asked:
            self.pycma.ask()  # pycma wants to be asked first; these candidates are nobody's
        self.asked = False
        self.pycma.tell(list(candidates_KN.double().numpy()), _finite(losses_K).tolist(), check_points=False)
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
        """What the next `CMAES` goes on from."""
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


def _finite(losses_K: Tensor) -> Tensor:
    good = losses_K.double()[torch.isfinite(losses_K)]
    worst = float(good.max()) if len(good) else 0.0
    return torch.where(torch.isfinite(losses_K), losses_K.double(), worst)


def _pycma() -> Any:
    """pycma warns on import where matplotlib is not there, which is for plots alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("cma")
