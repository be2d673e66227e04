"""A member's mixture in a library: prompts, and heads on their features, with weights.

`methods.shared.mixture` computes the weights from the member's own records. All logits are linear in the features, so
rows and biases describe them. A mixture reveals the records that it was fitted to, as a head does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ficpd.methods.shared.mixture import NEGLIGIBLE, Candidate, Member
from ficpd.types import Batch, ModelOutput, Predictor


@dataclass(frozen=True, eq=False)
class Mixture:
    """M heads on K prompts of P rows, for C labels and features of width D.

    prompts_KPD: the prompts. prompt_M: each head's prompt. weight_M: each head's share; they sum to 1.
    rows_MCD, bias_MC: each head's logits are features @ rows.T + bias.
    """

    prompts_KPD: Tensor
    prompt_M: Tensor
    weight_M: Tensor
    rows_MCD: Tensor
    bias_MC: Tensor

    def predictors(self) -> list[Predictor]:
        """Returns one `Predictor` for each prompt."""
        found = []
        for k, prompt_PD in enumerate(self.prompts_KPD):
            own = self.prompt_M == k
            weight_M = self.weight_M[own]
            logits = _logits(weight_M, self.rows_MCD[own], self.bias_MC[own])
            found.append(Predictor(prompt_PD, logits, float(weight_M.sum())))
        return found

    def to_tensors(self) -> dict[str, Tensor]:
        heads = torch.cat([self.rows_MCD, self.bias_MC[..., None]], dim=2)
        return {"prompts": self.prompts_KPD, "prompt": self.prompt_M.float(), "weight": self.weight_M, "heads": heads}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> "Mixture":
        """Builds a mixture from `to_tensors`. Raises `KeyError` or `ValueError` if parts do not match."""
        prompts, prompt, weight, heads = (tensors[name] for name in ("prompts", "prompt", "weight", "heads"))
        whole = heads.ndim == 3 and prompts.ndim == 3 and heads.shape[2] == prompts.shape[2] + 1
        if not whole or not len(prompt) == len(weight) == len(heads) or set(prompt.tolist()) != {*range(len(prompts))}:
            raise ValueError("the parts of its mixture do not match")
        return Mixture(prompts, prompt.long(), weight, heads[..., :-1], heads[..., -1])


def stack_members(
    candidates: Sequence[Candidate], members: Sequence[Sequence[Member]], weights: Sequence[Tensor]
) -> Mixture:
    """Stacks the heads whose weight exceeds `NEGLIGIBLE`."""
    prompts, index, shares, rows, biases = [], [], [], [], []
    for candidate, of, weight_M in zip(candidates, members, weights, strict=True):
        kept = [(member, w) for member, w in zip(of, weight_M.tolist(), strict=True) if w > NEGLIGIBLE]
        for member, weight in kept:
            rows_CD, bias_C = member.readout()
            index.append(len(prompts))
            shares.append(weight)
            rows.append(rows_CD)
            biases.append(bias_C)
        prompts += [candidate.prompt_PD.detach().float().cpu()] if kept else []
    weight_M = torch.tensor(shares)
    return Mixture(
        torch.stack(prompts), torch.tensor(index), weight_M / weight_M.sum(), torch.stack(rows), torch.stack(biases)
    )


def _logits(weight_M: Tensor, rows_MCD: Tensor, bias_MC: Tensor) -> Callable[[ModelOutput, Batch], Tensor]:
    """Returns logits whose softmax is the heads' weighted probabilities."""

    def logits(outputs: ModelOutput, batch: Batch) -> Tensor:
        features_RD = outputs.features_RD.float().cpu()
        share_RMC = (torch.einsum("rd,mcd->rmc", features_RD, rows_MCD) + bias_MC).softmax(-1)
        return torch.einsum("m,rmc->rc", weight_M / weight_M.sum(), share_RMC).clamp(min=1e-12).log()

    return logits
