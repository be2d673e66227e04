"""PromptDPSGD: each client tunes its own prompt by DP-SGD and sends nothing.

Duan et al., "Flocks of Stochastic Parrots", NeurIPS 2023, arXiv 2305.15594.

    per step  Poisson sample -> gradient of each record with respect to the prompt -> clip to C -> sum + N(0, σ²C²) -> step

This is `local` with a record-level mechanism. It protects records from users of the prompt, not from the server,
which receives nothing. Without it a service with the prompt allows membership inference (as in the paper). With it
the prompt is (ε, δ)-DP and could be published; so `releases` is true. Client-level privacy has no update to noise.

Start, optimizer and rates are the experiment's, not the paper's.
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
    through `ClientContext.private_mean`. The ledger charges each step. Updates are empty."""

    name = "prompt_dpsgd"
    capabilities = Capabilities(
        private_units=("record",),
        not_private="its clients send no updates to noise; use privacy.name = 'record_gaussian'",
    )
