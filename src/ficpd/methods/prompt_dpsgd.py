"""PromptDPSGD: every client tunes a prompt of its own by DP-SGD, and nobody hears of it (Duan et al., "Flocks of Stochastic
Parrots", NeurIPS 2023, arXiv 2305.15594).

    per step  Poisson sample -> gradient of each record with respect to the prompt -> clip to C -> sum + N(0, σ²C²) -> step

`local` with the mechanism: no record is hidden from the server by it, for nothing leaves either way, but from whoever uses
the prompt. A service that answers with a prompt in front tells of the records that the prompt was tuned on (the paper's
membership inference); of this one it tells within (ε, δ), as if the prompt had been published. So its `releases` is true:
the prompt is what is paid for. Only a record-level mechanism makes it private; one on updates has nothing to noise.

The paper has one party and settings of its own for each task; here the experiment's start, optimizer and rates are used, as
in all methods, so that they can be compared.
"""

from ficpd.federation.method import Capabilities
from ficpd.methods.local import Local
from ficpd.optimizers import LocalTrainingConfig
from ficpd.registry import FrozenConfig


class Config(FrozenConfig):
    """The method has no settings."""


def build(config: Config, training: LocalTrainingConfig) -> "PromptDpsgd":
    return PromptDpsgd(training)


class PromptDpsgd(Local):
    """Guarantees (`tests/methods/test_prompt_dpsgd.py`): the prompt and the optimizer's moments depend on the records only
    through `ClientSide.mean`; each step is paid for; nothing leaves but that an order was carried out."""

    name = "prompt_dpsgd"
    capabilities = Capabilities(
        private_units=("record",),
        not_private="its clients send nothing that noise could be added to; use privacy.name = 'record_gaussian'",
    )
