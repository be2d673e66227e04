"""Small federations on the tiny backbone: what most tests run on."""

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ficpd import rng
from ficpd.backbones import tiny
from ficpd.backbones.query_engine import QueryEngine, run_queries
from ficpd.errors import CodecError
from ficpd.experiments.config import Experiment, parse
from ficpd.experiments.runner import run as run_experiment
from ficpd.federation import simulation
from ficpd.federation.client import Client
from ficpd.federation.compression import none
from ficpd.federation.execution import execute_assignment
from ficpd.federation.method import Method, validate_assignment
from ficpd.federation.rounds import Round, RoundSchedule, run_rounds
from ficpd.interfaces import Compression, Engine, Task
from ficpd.library.library import PromptLibrary
from ficpd.optimizers import LocalTrainingConfig
from ficpd.privacy.ledger import Budget, Ledger
from ficpd.privacy.none import NoPrivacy
from ficpd.registry import load
from ficpd.tasks import classification, multiple_choice, regression, synthetic_records
from ficpd.types import (
    Answer,
    ArraySpec,
    Assignment,
    ClientCard,
    ClientUpdate,
    FederationInfo,
    Prompt,
    Query,
    Record,
    State,
    UpdateSpec,
)

CPU = torch.device("cpu")
GOOD = ["good", "fine", "lovely", "bright"]
BAD = ["bad", "dull", "awful", "grey"]
OTHER = ["the", "film", "was", "a", "story", "and", "we", "saw", "it", "twice"]
LABELS = {"good": "good fine", "bad": "bad dull"}
ANCHORS = {"bad dull": 1.0, "good fine": 5.0}
TRAINING = LocalTrainingConfig(local_steps=2, batch_size=4, learning_rate=0.1)


def backbone(width: int = 16, depth: int = 2, max_tokens: int = 64, dtype: torch.dtype = torch.float32) -> tiny.Tiny:
    config = tiny.Config(width=width, depth=depth, max_tokens=max_tokens)
    return tiny.build(config, None, dtype=dtype, attention="eager", device=CPU, name="tiny")


def classes(**more: Any) -> classification.Classification:
    return classification.build(classification.Config(**{"labels": LABELS, "instruction": "it was", **more}))


def numbers(**more: Any) -> regression.Regression:
    return regression.build(regression.Config(anchors=ANCHORS, instruction="it was", **more))


def records(count: int, seed: int = 0, name: str = "file.csv", real: bool = False) -> list[Record]:
    """Sentences of different lengths, each with one word that tells its label (or its number from 1 to 5)."""
    random = rng.make_generator("small records", seed)
    found = []
    for place in range(count):
        good = bool(torch.randint(2, (1,), generator=random))
        words = [OTHER[int(torch.randint(len(OTHER), (1,), generator=random))] for _ in range(2 + place % 5)]
        words.insert(1, (GOOD if good else BAD)[int(torch.randint(4, (1,), generator=random))])
        target = (4.0 if good else 2.0) + place % 3 / 2 if real else "good" if good else "bad"
        found.append(Record(f"{name} row {place + 1}", {"text": " ".join(words), "target": target}))
    return found


def choices(**more: Any) -> multiple_choice.MultipleChoice:
    return multiple_choice.build(multiple_choice.Config(instruction="it was", **more))


def questions(count: int, seed: int = 0, name: str = "file.jsonl") -> list[Record]:
    """The same sentences, each with two, three or five options of its own, in changing order."""
    found = []
    for place, record in enumerate(records(count, seed, name)):
        options = ["good fine", "bad dull", "a story", "we saw it", "twice"][: (2, 5, 3)[place % 3]]
        options = options[place % 2 :] + options[: place % 2]
        right = options.index(LABELS[record.fields["target"]])
        found.append(Record(record.key, {**record.fields, "options": options, "target": right}))
    return found


def start(model: QueryEngine, task: Task, num_tokens: int = 3, enters_at: int = 1) -> Prompt:
    """Activations of a text, and as many rows of a readout as the task tunes."""
    tokens_PD = model.backbone.init_prompt("it was good and bad", num_tokens, enters_at, 0)
    heads_CD = model.backbone.init_prompt("good bad", task.head_rows, 0, 0) if task.head_rows else tokens_PD[:0]
    return Prompt(torch.cat([tokens_PD, heads_CD]), model.backbone.fingerprint, enters_at, task.head_rows)


def clients(
    model: QueryEngine, method: Method, count: int = 5, seed: int = 0, mechanism: Any = None, task: Task | None = None,
    compression: Compression | None = None, ledger: Ledger | None = None,
) -> dict[str, Client]:  # fmt: skip
    """Members of unequal size; one that holds all records where the method pools them."""
    task, mechanism = task or classes(), mechanism or NoPrivacy()
    shares = {f"site-{i}": records(5 + 2 * i, i, f"site-{i}.csv") for i in range(count)}
    if method.capabilities.centralized:
        shares = {"everyone": [record for share in shares.values() for record in share]}
    begin = start(model, task)
    if method.capabilities.prompt_type != "soft":
        begin = method.init_prompt(begin, model.backbone, 0)
    compression = compression or whole(begin)
    ledger = ledger or (Ledger(":memory:", "a run") if mechanism.unit != "none" else None)
    budget = Budget(None, 1e-5)
    return {
        name: Client(
            ClientCard(name), share, records(4, 100, "test.csv"), task, model.backbone, mechanism, compression, begin,
            rng.derive_seed(seed, "private", name), ledger and ledger.account(name, budget),
        )
        for name, share in shares.items()
    }  # fmt: skip


def whole(begin: Prompt) -> Compression:
    """No compression."""
    return none.build(none.Config(), begin, 0)


def wire(layout: UpdateSpec) -> dict[str, ArraySpec]:
    """How arrays of this layout travel without compression."""
    return {n: kind if isinstance(kind, ArraySpec) else ArraySpec(tuple(kind)) for n, kind in layout.items()}


def method(name: str, training: LocalTrainingConfig = TRAINING, **config: Any) -> Method:
    module = load("methods", name)
    return module.build(module.Config(**config), training)


def engine(
    chosen: Method, members: Mapping[str, Client], model: QueryEngine, lock_step: int = 64
) -> simulation.SimulationEngine:
    return simulation.build(simulation.Config(lock_step=lock_step), chosen, members, model)


def first_state(
    chosen: Method, members: Mapping[str, Client], rounds: int = 2, seed: int = 0, readable: QueryEngine | None = None
) -> State:
    """`readable`: the model, so that a method may learn a readout of the members' features."""
    cards = [client.card for client in members.values()]
    begin = next(iter(members.values())).start
    first = next(iter(members.values()))
    setup = FederationInfo(begin, cards, rounds, len(cards), seed, {"": first.task.num_labels})
    if readable is not None and chosen.capabilities.learns_readout:
        batch = first.task.encode(synthetic_records(readable.backbone, 32, 0), readable.backbone, begin)
        outputs = readable.answer([Query(begin.vectors_PD[None], batch, outputs=True)])[0].outputs_KB
        texts = {} if batch.readout_CD is None or begin.head_rows else {"": batch.readout_CD}
        setup = replace(setup, texts=texts, features_MD=outputs.features_RD, unit=first.mechanism.unit)
    return chosen.init(setup)


def rounds(
    chosen: Method, members: Mapping[str, Client], model: QueryEngine, schedule: RoundSchedule | None = None,
    through: Engine | None = None, lock_step: int = 64,
) -> tuple[State, list[Round]]:  # fmt: skip
    """The last state, and what every round reported."""
    schedule = schedule or RoundSchedule(2, len(members), 0)
    through = through or engine(chosen, members, model, lock_step)
    state, reports = first_state(chosen, members, schedule.num_rounds, schedule.seed), []
    compression = next(iter(members.values())).compression
    for after, report in run_rounds(chosen, through, model, state, schedule, compression):
        state = after
        reports.append(report)
    return state, reports


def update(chosen: Method, client: Client, state: State, model: Any, round: int = 1) -> ClientUpdate:
    """The client's update of a round, from the server's own assignment."""
    return run_queries(model, execute_assignment(chosen, client, chosen.make_assignment(state, client.card, round)))


def updates(chosen: Method, members: Iterable[Client], state: State, model: Any, round: int = 1) -> list[ClientUpdate]:
    return [update(chosen, client, state, model, round) for client in members]


def alone(chosen: Method, client: Client, model: Any, rounds: int = 3) -> Iterator[ClientUpdate]:
    """The updates of one client in rounds that it has to itself. `model` answers the client and nobody else."""
    state = first_state(chosen, {client.name: client}, rounds)
    for round in range(1, rounds + 1):
        yield (sent := update(chosen, client, state, model, round))
        state = chosen.aggregate(state, [sent], round, model)


def refuses_all(chosen: Method, start: Prompt, good: Assignment, *bad: Assignment) -> None:
    """A site takes the server's own assignment, and none of the others."""
    validate_assignment(good, chosen, start, 5)
    for other in bad:
        with pytest.raises(CodecError):
            validate_assignment(other, chosen, start, 5)


class Listening:
    """A model that remembers which prompts it was asked about."""

    def __init__(self, model: QueryEngine):
        self.model, self.backbone, self.asked = model, model.backbone, []

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        self.asked += [query.prompts_KPD.clone() for query in queries]
        return self.model.answer(queries)


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """The same names, and under each the same numbers to the last bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def close(left: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Of one shape, and nowhere further apart than `tolerance` times the largest number (or 1)."""
    scale = max([1.0, *right[torch.isfinite(right)].abs().flatten().tolist()])
    return left.shape == right.shape and torch.allclose(left, right, rtol=0, atol=tolerance * scale)


def shuffled(things: Iterable, seed: int = 0) -> list:
    kept: Sequence = list(things)
    return [kept[i] for i in torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed)).tolist()]


# ---------------------------------------------------------------- whole experiments, from a table


def table(path: Path, count: int = 60, sites: int = 3) -> Path:
    """A CSV of sentences, their labels and the site that each comes from."""
    lines = ["text,target,site"]
    lines += [f"{r.fields['text']},{r.fields['target']},site-{i % sites}" for i, r in enumerate(records(count, 1))]
    path.write_text("\n".join(lines) + "\n")
    return path


NUMBERS = "task={name='regression',anchors={'bad dull'=1.0,'good fine'=5.0}}"
"""A change of an experiment's task, for the table once it is `numbered`."""


def numbered(path: Path) -> None:
    """The table's labels as numbers."""
    path.write_text(path.read_text().replace(",good,", ",4.5,").replace(",bad,", ",1.5,"))


def toml(data: Path, method: str = "fedavg", rounds: int = 3, seed: int = 0) -> str:
    return f"""
name = "small"
seed = {seed}
baselines = []
[backbone]
name = "tiny"
attention = "eager"
dtype = "float32"
options = {{ width = 16 }}
[prompt]
num_tokens = 3
[task]
name = "classification"
instruction = "it was"
labels = {{ good = "good fine", bad = "bad dull" }}
[data]
source = {json.dumps(str(data))}
keep = ["site"]
[partition]
kind = "column"
column = "site"
[method]
name = "{method}"
[training]
local_steps = 2
batch_size = 4
[federation]
num_rounds = {rounds}
"""


def experiment(folder: Path, method: str = "fedavg", *changes: str, rounds: int = 3, seed: int = 0) -> Experiment:
    folder.mkdir(parents=True, exist_ok=True)
    return parse(toml(table(folder / "records.csv"), method, rounds, seed), "small.toml", changes)


def run(folder: Path, method: str = "fedavg", *changes: str, rounds: int = 3, seed: int = 0) -> dict[str, Any]:
    """A whole run into `folder/run`; its result."""
    return run_experiment(experiment(folder, method, *changes, rounds=rounds, seed=seed), folder / "run")


def library(folder: Path) -> dict[str, torch.Tensor]:
    """All prompts that a run in `folder/run` left."""
    found = PromptLibrary.load(folder / "run")
    return {name: prompt.vectors_PD for name, prompt in found.candidates().items()}


def page(folder: Path) -> str:
    """The text of the page of the run in `folder`, without tags, styles and scripts."""
    text = re.sub(r"<(style|script).*?</\1>", "", (folder / "run" / "report.html").read_text(), flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", "", text))
