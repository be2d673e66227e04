"""DP-FPL: a global prompt, and a local one that is learned through low-rank gradients (Tran et al., ICLR 2025, arXiv
2501.13904), with an accountant that holds.

    p_i = p_G + l_i,    l_i = u v + r:  u [P, k], v [k, D] by one power iteration of l_i in every step, both orthonormal
    per step   g_G = ∂L/∂p_G,  g_u = ∂L/∂u = G vᵀ,  g_v = ∂L/∂v = uᵀ G   (G, the gradient at p_i, is g_G)
               clip, noise, then   g_l = g_u v + u g_v - u uᵀ g_u v   (Yu et al., ICML 2021, arXiv 2106.09352)
    leaves     how far p_G went; the server takes the mean. l_i stays

The residual r is what the factors leave of l_i; it takes part in the forward pass, is learned by nobody, and gets no noise
of its own. Does the guarantee hold, though gradients are taken at p_G + u v + r? Only because l_i moves along the *noised*
g_l alone: then l_i, its factors, and r, which is l_i less their product, are all made of noised numbers, and a step at p_i
is one at a prompt that might be published. A residual that was tuned on records itself (as FPL's is, at home) would break
it: one record would move r, and with r every other record's gradient, past a clip that bounds one record's own.

What is ours, for the published code proves nothing of what it states:

- each record is clipped, its g_G, g_u and g_v together as one vector, and one noise falls on their sum. (The code clips the
  batch's mean three times over, takes C/B for its sensitivity, and draws noise for every minibatch but counts rounds.)
- the noise on g_G is the client's own. (The code's server adds it, and sees what clients send as it is.)
- the last term of g_l is subtracted, which makes g_l the projection of G. (The code adds it.)
- l_i starts at zero, at a public random u and v: the start is a text's activations, which a random l_i would drown.
- as many steps a round as the experiment asks for, by its optimizer (the paper: one of plain SGD, p_G synchronised
  after it).

A subspace (`compression.subspace`) is not tuned in: low rank is this method's own way to fewer numbers; what leaves is
projected onto it all the same.
"""

from collections.abc import Generator, Sequence

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
"""Of the public noise beside l_i when it is factorised: it decides where l_i is zero, and nowhere else."""


class Config(FrozenConfig):
    """`rank` is k, the paper's 8 (at most the prompt's own rank is taken). The paper's batches of 32 and clip of 10 are not
    taken over: batch, rate and clip norm are the experiment's, as for all methods, so that they can be compared."""

    rank: int = Field(default=8, ge=1)
    robust: RobustConfig = MEAN


def build(config: Config, training: LocalTrainingConfig) -> "DpFpl":
    return DpFpl(config, training)


class DpFpl(FedAvg):
    """Guarantees (`tests/methods/test_dp_fpl.py`): every prompt that is asked about depends on the records only through
    `ClientSide.mean`, which is given all that is noised of a record as one vector; factors are orthonormal, and g_l without
    noise is the projection of G onto what they span, so never longer."""

    name = "dp_fpl"

    def __init__(self, config: Config, training: LocalTrainingConfig):
        super().__init__(training, config.robust)
        self.rank = config.rank

    def check_compatible(self, tasks: Sequence[Task], backbone: Backbone) -> None:
        optimizer = self.training.optimizer
        if not backbone.supports_gradients or load("optimizers", optimizer).black_box:
            raise ConfigError(
                f"dp_fpl needs gradients, and training.optimizer = {optimizer!r} on {backbone.name} has none; take "
                "adam or sgd and a backbone that gives them, or another method (dp_zo, dp_cma_es)"
            )

    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        shared = assignment.arrays["prompt"]
        both = torch.stack([shared, client.client_state.get("local", torch.zeros_like(shared))])
        carried = LowRankContext(client, self.rank, assignment.round)
        batches = client.batches(self.training.local_steps, self.training.batch_size)
        settings = {
            "learning_rate": assignment.facts["rate"],
            "l2_weight": self.training.l2_weight,
            "memory": client.client_state,
        }
        work = load("optimizers", self.training.optimizer).tune(carried, both, batches, **settings)
        tuned = yield from map_queries(work, carried.sum_prompts)
        client.client_state["local"] = tuned[1]
        return ClientUpdate(client.id, {"delta": tuned[0] - shared}, client.weight)

    def personal_prompt(self, client: ClientContext, assignment: Assignment) -> Tensor:
        shared = assignment.arrays["prompt"]
        return shared + client.client_state["local"] if "local" in client.client_state else shared


class LowRankContext:
    """What a optimizer that moves [p_G, l_i], [2, P, D], sees of a client: gradients that carry G in few numbers."""

    subspace = None

    def __init__(self, client: ClientContext, rank: int, round: int):
        self.client, self.rank = client, rank
        self.random = rng.make_generator("dp_fpl", client.id, round)  # public
        self.factors = torch.empty(0), torch.empty(0)

    def sum_prompts(self, query: Query) -> Query:
        """The optimizer's query, of p_G + l_i instead of both."""
        shared_PD, local_PD = query.prompts_KPD[0]
        self.factors = low_rank_factors(local_PD, self.rank, self.random)
        return query._replace(prompts_KPD=(shared_PD + local_PD)[None])

    def private_mean(self, values_KB: Tensor) -> Tensor:
        """[1, B, P, D], the gradients at p_i, to [1, 2, P, D]: g_G and g_l."""
        gradient_BPD, (u_Pk, v_kD) = values_KB[0], self.factors
        u, v = u_Pk.to(gradient_BPD.device), v_kD.to(gradient_BPD.device)
        of_u, of_v = (
            [row @ v.T for row in gradient_BPD],
            [u.T @ row for row in gradient_BPD],
        )  # record by record, as in `optimizers.tune`
        parts = gradient_BPD, *(torch.stack(of) if of else gradient_BPD for of in (of_u, of_v))  # g_G, g_u, g_v
        mean_N = self.client.private_mean(torch.cat([part.flatten(1) for part in parts], dim=1)[None])[0]
        shapes = gradient_BPD.shape[1:], u_Pk.shape, v_kD.shape
        split = mean_N.split([shape.numel() for shape in shapes])
        shared_PD, of_u, of_v = (part.view(shape) for part, shape in zip(split, shapes, strict=True))
        return torch.stack([shared_PD, low_rank_gradient(of_u, of_v, u_Pk, v_kD)])[None]


def low_rank_factors(local_PD: Tensor, rank: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """u [P, k] and v [k, D], orthonormal columns and rows, k = min(rank, P, D): one power iteration from a random matrix."""
    num_tokens, width = local_PD.shape
    noise_PD = torch.randn(num_tokens, width, generator=random, dtype=torch.float64)
    begin_Dk = torch.randn(width, min(rank, num_tokens, width), generator=random, dtype=torch.float64)
    seen_PD = local_PD.double() + SMALL * noise_PD
    u_Pk = torch.linalg.qr(seen_PD @ begin_Dk).Q
    v_Dk = torch.linalg.qr(seen_PD.T @ u_Pk).Q
    return u_Pk.float(), v_Dk.T.float().contiguous()


def low_rank_gradient(of_u_Pk: Tensor, of_v_kD: Tensor, u_Pk: Tensor, v_kD: Tensor) -> Tensor:
    """g_l [P, D] = g_u v + u g_v - u uᵀ g_u v."""
    along_v = of_u_Pk @ v_kD
    return along_v + u_Pk @ of_v_kD - u_Pk @ (u_Pk.T @ along_v)
