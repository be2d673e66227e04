"""DP-FPL: tunes a global prompt, and a local one through low-rank gradients, with a sound accountant.

After Tran et al., ICLR 2025, arXiv 2501.13904.

    p_i = p_G + l_i,    l_i = u v + r:  u [P, k], v [k, D] by one power iteration of l_i in every step, both orthonormal
    per step   g_G = ∂L/∂p_G,  g_u = ∂L/∂u = G vᵀ,  g_v = ∂L/∂v = uᵀ G   (G, the gradient at p_i, is g_G)
               clip, noise, then   g_l = g_u v + u g_v - u uᵀ g_u v   (Yu et al., ICML 2021, arXiv 2106.09352)
    update     the change of p_G; the server takes the mean. l_i stays on the client

The residual r takes part in the forward pass, but is neither tuned nor noised. The guarantee holds because l_i moves
along the *noised* g_l only. So l_i, its factors and r are post-processing, and p_i could be published. A residual
tuned on records without noise (as in `fpl`) would break this: one record would change the gradients of all others.

Differences to the published code, whose accountant is not sound:

- A record's g_G, g_u and g_v are clipped together, and their sum gets one noise. (The code clips the batch's mean three
  times, takes C/B for its sensitivity, and draws noise for every minibatch but counts rounds.)
- The client adds the noise on g_G. (In the code the server does, and sees the updates without noise.)
- The last term of g_l is subtracted, so that g_l is the projection of G. (The code adds it.)
- l_i starts at zero, with public random u and v. A random l_i would be larger than the initial prompt.
- A round has the configured steps and optimizer. (The paper: one step of plain SGD, then p_G is synchronised.)

Tuning ignores `compression.subspace`; the update is projected onto it.
"""

from collections.abc import Generator, Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from ficpd import rng
from ficpd.errors import ConfigError
from ficpd.federation.aggregation.robust import MEAN, RobustConfig
from ficpd.interfaces import Backbone, ClientContext, Task
from ficpd.methods.fedavg import FedAvg
from ficpd.optimizers import LocalTrainingConfig, map_queries
from ficpd.registry import FrozenConfig, load
from ficpd.types import Answer, Assignment, ClientUpdate, Query

SMALL = 1e-6
"""Scale of the public noise added to l_i before its factorisation; it matters only where l_i is zero."""


class Config(FrozenConfig):
    """rank: k (the paper: 8), at most the prompt's rank. Batch size and clip norm are the experiment's."""

    rank: int = Field(default=8, ge=1)
    robust: RobustConfig = MEAN


def build(config: Config, training: LocalTrainingConfig) -> "DpFpl":
    return DpFpl(config, training)


class DpFpl(FedAvg):
    """Guarantees (`tests/methods/test_dp_fpl.py`): queried prompts depend on the records only through
    `ClientContext.private_mean`, which clips a record's gradients as one vector. Factors are orthonormal. Without noise
    g_l is the projection of G onto their span, and so never longer than G."""

    name = "dp_fpl"

    def __init__(self, config: Config, training: LocalTrainingConfig):
        super().__init__(training, config.robust)
        self.capabilities = replace(self.capabilities, subspace=False, gradient_sum=False)
        self.rank = config.rank

    def check_compatible(self, tasks: Sequence[Task], backbone: Backbone) -> None:
        optimizer = self.training.optimizer
        if not backbone.supports_gradients or load("optimizers", optimizer).black_box:
            raise ConfigError(
                f"training.optimizer = {optimizer!r} on {backbone.name}: dp_fpl needs gradients. Use adam or sgd on a "
                "backbone with gradients, or another method (dp_zo, dp_cma_es)"
            )

    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        shared = assignment.arrays["prompt"]
        both = torch.stack([shared, client.client_state.get("local", torch.zeros_like(shared))])
        carried = LowRankContext(client, self.rank, assignment.round)
        batches = client.batches(self.training.local_steps, self.training.batch_size)
        settings = {"learning_rate": assignment.facts["rate"], "l2_weight": self.training.l2_weight}
        optimizer = load("optimizers", self.training.optimizer)
        work = optimizer.tune(carried, both, batches, memory=client.client_state, **settings)
        tuned = yield from map_queries(work, carried.sum_prompts)
        client.client_state["local"] = tuned[1]
        return ClientUpdate(client.id, {"delta": tuned[0] - shared}, client.weight)

    def personal_prompt(self, client: ClientContext, assignment: Assignment) -> Tensor:
        shared = assignment.arrays["prompt"]
        return shared + client.client_state["local"] if "local" in client.client_state else shared


class LowRankContext:
    """A client for an optimizer of [p_G, l_i], [2, P, D]. Its gradients are g_G and g_l."""

    subspace = None

    def __init__(self, client: ClientContext, rank: int, round: int):
        self.client, self.rank = client, rank
        self.random = rng.make_generator("dp_fpl", client.id, round)  # public
        self.factors = torch.empty(0), torch.empty(0)

    def sum_prompts(self, query: Query) -> Query:
        """Replaces the optimizer's query of [p_G, l_i] by one of p_G + l_i."""
        shared_PD, local_PD = query.prompts_KPD[0]
        self.factors = low_rank_factors(local_PD, self.rank, self.random)
        return query._replace(prompts_KPD=(shared_PD + local_PD)[None])

    def private_mean(self, values_KB: Tensor) -> Tensor:
        """Maps the gradients at p_i, [1, B, P, D], to the noised g_G and g_l, [1, 2, P, D]."""
        gradient_BPD, (u_Pk, v_kD) = values_KB[0], self.factors
        u, v = u_Pk.to(gradient_BPD.device), v_kD.to(gradient_BPD.device)
        # Record by record, because rounding depends on the batch size.
        of_u, of_v = [row @ v.T for row in gradient_BPD], [u.T @ row for row in gradient_BPD]
        parts = gradient_BPD, *(torch.stack(of) if of else gradient_BPD for of in (of_u, of_v))  # g_G, g_u, g_v
        mean_N = self.client.private_mean(torch.cat([part.flatten(1) for part in parts], dim=1)[None])[0]
        shapes = gradient_BPD.shape[1:], u_Pk.shape, v_kD.shape
        split = mean_N.split([shape.numel() for shape in shapes])
        shared_PD, of_u, of_v = (part.view(shape) for part, shape in zip(split, shapes, strict=True))
        return torch.stack([shared_PD, low_rank_gradient(of_u, of_v, u_Pk, v_kD)])[None]


def low_rank_factors(local_PD: Tensor, rank: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns u [P, k] and v [k, D], orthonormal, by one power iteration from a random matrix. k = min(rank, P, D)."""
    num_tokens, width = local_PD.shape
    noise_PD = torch.randn(num_tokens, width, generator=random, dtype=torch.float64)
    begin_Dk = torch.randn(width, min(rank, num_tokens, width), generator=random, dtype=torch.float64)
    seen_PD = local_PD.double() + SMALL * noise_PD
    u_Pk = torch.linalg.qr(seen_PD @ begin_Dk).Q
    v_Dk = torch.linalg.qr(seen_PD.T @ u_Pk).Q
    return u_Pk.float(), v_Dk.T.float().contiguous()


def low_rank_gradient(of_u_Pk: Tensor, of_v_kD: Tensor, u_Pk: Tensor, v_kD: Tensor) -> Tensor:
    """Returns g_l [P, D] = g_u v + u g_v - u uᵀ g_u v."""
    along_v = of_u_Pk @ v_kD
    return along_v + u_Pk @ of_v_kD - u_Pk @ (u_Pk.T @ along_v)
