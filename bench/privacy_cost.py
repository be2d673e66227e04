"""What record-level privacy adds to a training step: ours against none, and Opacus on the same prompt parameters.

python bench/privacy_cost.py      five minutes on two cores, with the machine to itself

One client of MiniLM, orders of four steps of 32 records, Poisson in all three; ours counts the ledger's commit too. Opacus
wraps the prompt as an embedding (as PEFT has it), with its own sampler, optimiser and hooks, over the same layers of the
same backbone, whose lower layers are computed beforehand for all.
"""

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ficpd.backbones.chunks import UNBATCHED
from ficpd.backbones.query_engine import QueryEngine, run_queries
from ficpd.experiments.build import ExperimentContext, build_context
from ficpd.federation.client import Client
from ficpd.federation.execution import execute_assignment
from ficpd.methods import fedavg
from ficpd.optimizers import LocalTrainingConfig
from ficpd.privacy import none, record_gaussian
from ficpd.privacy.ledger import Budget, Ledger
from ficpd.registry import build_config
from ficpd.types import Assignment, ClientCard, ClientWorkload
from measure import medians, paired, parse, quietness, ratio, save
from privacy import POLARITY

STEPS, BATCH = 4, 32


class Prompted(nn.Module):
    """Prompt vectors as an embedding in front of frozen layers: all that Opacus sees is the embedding."""

    def __init__(self, context: ExperimentContext, batch, states: list[Tensor]):
        super().__init__()
        self.prompt = nn.Embedding.from_pretrained(context.start.vectors_PD.clone(), freeze=False)
        self.context, self.batch, self.states = [context], [batch], states

    def forward(self, index_B: Tensor) -> Tensor:
        context, batch = self.context[0], self.batch[0]
        prompts_BPD = self.prompt(torch.arange(self.prompt.num_embeddings).expand(len(index_B), -1))
        places = index_B.tolist()
        items = [batch.items[i][0] for i in places]
        outputs = context.model.backbone.forward(prompts_BPD, [self.states[i] for i in places], items, batch.enters_at)
        return context.task.loss(outputs, batch.select(places))


def with_opacus(context: ExperimentContext, client: Client):
    """Four steps as Opacus' own tutorial does them."""
    from opacus import PrivacyEngine

    batch = client.encoded()
    states = context.model.kept.fetch([items[0] for items in batch.items], batch.enters_at, context.model.backbone)
    module = Prompted(context, batch, states)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
    loader = DataLoader(TensorDataset(torch.arange(len(batch))), batch_size=BATCH)
    made: Any = PrivacyEngine(accountant="prv").make_private(
        module=module, optimizer=optimiser, data_loader=loader, noise_multiplier=1.0, max_grad_norm=0.1
    )
    module, optimiser, loader = made

    def steps() -> None:
        done = 0
        while done < STEPS:
            for (index_B,) in loader:
                optimiser.zero_grad()
                if len(index_B):
                    module(index_B).mean().backward()
                    optimiser.step()
                done += 1
                if done == STEPS:
                    return

    return steps


def ours(model: QueryEngine, context: ExperimentContext, client: Client, mechanism, account):
    training = LocalTrainingConfig(local_steps=STEPS, batch_size=BATCH, learning_rate=0.01)
    method, rounds = fedavg.build(fedavg.Config(), training), iter(range(1, 10**6))
    client = replace(client, mechanism=mechanism, account=account)

    def order() -> None:
        arrays = {"prompt": context.start.vectors_PD}
        run_queries(
            model,
            execute_assignment(method, client, Assignment("fedavg", next(rounds), arrays, {"rate": 0.01})),
        )

    return order


def main() -> None:
    quiet = quietness()
    context = build_context(parse(POLARITY))
    shard = next(iter(context.shards.values()))
    n = len(shard.train)
    plan = ClientWorkload(n, BATCH / n, STEPS, 1000, 10, 1.0, 1000)
    module, config = build_config("compression", {"name": "none"})
    compression = module.build(config, context.start, 0)
    client = Client(
        ClientCard("one"),
        shard.train,
        (),
        context.task,
        context.model.backbone,
        none.NoPrivacy(),
        compression,
        context.start,
        1,
    )

    class Poisson(none.NoPrivacy):
        """No privacy, but Poisson batches, so that all see the same number of records."""

        def sample(self, num_records, expected_batch, steps, noise, subject_B=None):
            return [noise.poisson_sample(num_records, expected_batch / num_records) for _ in range(steps)]

    def private(noise: str):
        config = record_gaussian.Config(noise_multiplier=1.0, clip_norm=0.1, noise=noise)  # type: ignore[arg-type]
        return record_gaussian.build(config, plan)

    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite", "bench")
        account = partial(ledger.account, budget=Budget(None, 1e-5))
        backbone = context.model.backbone
        alone, shared = QueryEngine(backbone, chunk_tokens=UNBATCHED), QueryEngine(backbone, exact=True)
        works = {
            "none": ours(context.model, context, client, Poisson(), None),
            "record_gaussian": ours(context.model, context, client, private("simulated"), account("a")),
            "record_gaussian, cryptographic": ours(
                context.model, context, client, private("cryptographic"), account("b")
            ),
            "at a site, a forward for each record": ours(alone, context, client, private("simulated"), account("c")),
            "at a site, forward passes shared where no bit changes": ours(
                shared, context, client, private("simulated"), account("d")
            ),
            "opacus": with_opacus(context, client),
        }
        seconds = paired(works, repeats=15)
    result = {
        "quiet": quiet,
        "setting": f"MiniLM, 10 tokens at layer {context.start.enters_at}, {STEPS} steps of {BATCH} of {n} records",
        "seconds per order, median": medians(seconds),
        **{f"{name} / none": ratio(seconds, name, "none") for name in works if name != "none"},
    }
    print(result)
    save("privacy_cost", result)


if __name__ == "__main__":
    main()
