"""What a guarantee costs: accuracy by ε at record and client level, bytes by compression. MiniLM, three seeds.

python bench/privacy.py record|client|bytes|shared|dropouts [--seeds 0 1 2] [--data FOLDER]

`record`: polarity and medical abstracts, 10 sites, ε in {none, 8, 4, 2, 1}. `client`: the same ε for whole clients, local
and central, with 10, 100 and 500 clients. `bytes`: what travels against what it loses. `shared`: the quick start's forty
sites, and 6, 18 and 50, at ε = 1, 2 and 4, each with its own noise, with noise that they share, and without. `dropouts`:
rounds of a secure sum that are saved or void where sites leave, without records, with real keys and masks; `--seeds` are the
tries. Polarity is built in; the abstracts (CC BY-SA 3.0, see bench/README.md) lie in `--data`. Runs of one seed share the
world, so the lower layers are computed once. A cell of a seed that the result file has already, in the same setting, is not
run again; delete the file to begin anew.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ficpd.errors import PolicyError
from ficpd.experiments.build import ExperimentContext, build_context
from ficpd.experiments.initialization import calibrate_clipping_and_compression
from ficpd.experiments.results import RunResult
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import no_progress, run, run_method
from ficpd.federation import secure_sum
from ficpd.federation.codec import decode_assignment, encode_assignment
from ficpd.federation.secure_sum import PHASES, SIMULATED
from ficpd.federation.secure_sum.member import Member
from ficpd.federation.secure_sum.server import SecureSum, VoidRoundError, _Messages
from ficpd.privacy import shared_gaussian
from ficpd.privacy.shared_gaussian import GRADIENT, SharedGaussian, Tolerance, tolerance
from ficpd.registry import validated_section
from ficpd.types import Assignment, Reply
from measure import Cells, of_everyone, parse, read

POLARITY = """
[backbone]
name = "minilm"
options = { max_tokens = 48 }
[prompt]
num_tokens = 10
enters_at = 4
[task]
name = "classification"
instruction = "The sentiment of this sentence is"
labels = { negative = "negative", positive = "positive" }
[data]
source = "ratings"
columns = { text = "text", target = "polarity", domain = "domain" }
max_records = 12000
test_fraction = 0.08
[partition]
kind = "iid"
num_clients = 10
[method]
name = "fedavg"
[training]
local_steps = 2
batch_size = 20
[federation]
num_rounds = 12
"""
DISEASES = ["neoplasms", "digestive system diseases", "nervous system diseases", "cardiovascular diseases",
            "general pathological conditions"]  # fmt: skip
ABSTRACTS = """
[backbone]
name = "minilm"
options = { max_tokens = 64 }
[prompt]
num_tokens = 10
enters_at = 4
[task]
name = "classification"
instruction = "This abstract is about"
labels = { LABELS }
[data]
source = "DATA/medical_abstracts.parquet"
columns = { text = "text", target = "label_name" }
split_column = "split"
[partition]
kind = "iid"
num_clients = 10
[method]
name = "fedavg"
[training]
local_steps = 2
batch_size = 20
[federation]
num_rounds = 8
""".replace("LABELS", ", ".join(f'"{name}" = "{name}"' for name in DISEASES))
SUBSPACE = {"name": "subspace", "dimension": 64}
NONE = {"name": "none"}
BUDGETS = (None, 8.0, 4.0, 2.0, 1.0)
RATE = 0.5
"""Of the backbone's default rate, for Adam in the leading directions: the best of the few tried."""


def world_of(recipe: str, seed: int, data: str, changes: tuple[str, ...] = ()) -> ExperimentContext:
    built = build_context(parse(recipe.replace("DATA", data), [f"seed={seed}", *changes]))
    training = built.experiment.training
    slower = training.model_copy(update={"learning_rate": RATE * (training.learning_rate or 0)})
    return replace(built, experiment=built.experiment.model_copy(update={"training": slower}))


def trial(
    context: ExperimentContext, privacy: dict[str, Any], compression: dict[str, Any], **training: Any
) -> dict[str, float]:
    """One run of the world's method under these settings; its figures."""
    tuned = context.experiment.training.model_copy(update=training)
    experiment = context.experiment.model_copy(
        update={
            "privacy": validated_section("privacy", privacy, "bench"),
            "compression": validated_section("compression", compression, "bench"),
            "training": tuned,
        }
    )
    found = calibrate_clipping_and_compression(experiment, [context.task], context.model, context.start)
    changed = replace(context, experiment=found[0], compression=found[1])
    with tempfile.TemporaryDirectory() as folder:
        return figures(run_method(changed, experiment.method, RunDir(Path(folder) / "run"), None, no_progress))


def figures(result: RunResult) -> dict[str, float]:
    score = of_everyone(result)
    return {
        "accuracy": 100 * score["accuracy"],
        "macro F1": 100 * score["f1"],
        "bytes up": result.bytes.up_per_client_round,
        "epsilon": result.privacy.epsilon or 0.0,
    }


def zero_shot(context: ExperimentContext) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return figures(run_method(context, {"name": "zero_shot"}, RunDir(Path(folder) / "z"), None, no_progress))


def record(args: argparse.Namespace) -> None:
    """Record level by ε."""
    setting = (
        "10 sites, iid, fedavg with sgd in subspace 64; polarity 12, abstracts 8 rounds of 2 steps of 20; clip norm twice "
        "the median of made-up records"
    )
    cells = Cells("privacy_record", setting)
    for seed in args.seeds:
        for name, recipe in (("polarity", POLARITY), ("abstracts", ABSTRACTS)):
            context = world_of(recipe, seed, args.data)
            cells.add(f"{name}, zero-shot", seed, partial(zero_shot, context))
            full = (context.experiment.training.learning_rate or 0) / RATE
            for epsilon in BUDGETS:
                privacy = {"name": "record_gaussian", "epsilon": epsilon} if epsilon else NONE
                run = partial(trial, context, privacy, SUBSPACE, optimizer="sgd", learning_rate=full)
                cells.add(f"{name}, epsilon {epsilon}", seed, run)


CROWDS = {10: (10, 10), 100: (20, 5), 500: (50, 2)}
"""Clients: how many of them a round, and records a step. A round has about 200 records in each."""


def client(args: argparse.Namespace) -> None:
    """Client level by ε, number of clients and where the noise is added."""
    cells = Cells("privacy_client", "polarity, iid, fedavg, subspace 64, 6 rounds of 2 steps")
    for seed in args.seeds:
        for clients, (cohort, batch) in CROWDS.items():
            changes = (
                f"partition.num_clients={clients}",
                f"federation.clients_per_round={cohort}",
                "federation.num_rounds=6",
            )
            context = world_of(POLARITY, seed, args.data, changes)
            if clients == 10:
                cells.add("zero-shot", seed, partial(zero_shot, context))
            for placement in ("local", "central"):
                for epsilon in BUDGETS:
                    if epsilon is None and placement == "central":
                        continue
                    privacy = {"name": "client_gaussian", "placement": placement, "epsilon": epsilon}
                    name = f"{clients} clients, {placement if epsilon else 'no'} noise, epsilon {epsilon}"
                    cells.add(
                        name, seed, partial(trial, context, privacy if epsilon else NONE, SUBSPACE, batch_size=batch)
                    )


def travelling(args: argparse.Namespace) -> None:
    """Bytes against accuracy at ε = 2 and without privacy; 20 virtual tokens, so that 5 of 20 may travel."""
    forms = {
        "whole prompt, 32 bit": NONE,
        "whole prompt, 8 bit": {"name": "none", "bits": 8},
        "projected 5 of 20, 32 bit": {"name": "projected", "num_tokens": 5},
        "projected 5 of 20, 8 bit": {"name": "projected", "num_tokens": 5, "bits": 8},
        "subspace 16, 32 bit": {"name": "subspace", "dimension": 16},
        "subspace 64, 32 bit": {"name": "subspace", "dimension": 64},
        "subspace 256, 32 bit": {"name": "subspace", "dimension": 256},
        "subspace 256, 8 bit": {"name": "subspace", "dimension": 256, "bits": 8},
        "subspace 256, 32 bit, sgd": {"name": "subspace", "dimension": 256},
        "subspace 256, 8 bit, sgd": {"name": "subspace", "dimension": 256, "bits": 8},
        "subspace 64, 8 bit, sgd": {"name": "subspace", "dimension": 64, "bits": 8},
        "subspace 256, random directions, 32 bit": {"name": "subspace", "dimension": 256, "directions": "random"},
    }
    setting = "polarity, 10 sites, 20 virtual tokens, fedavg, 12 rounds of 2 steps of 10; clip norm twice the median"
    cells = Cells("privacy_bytes", setting)
    for seed in args.seeds:
        context = world_of(
            POLARITY,
            seed,
            args.data,
            ("prompt.num_tokens=20", "training.batch_size=10", "data.max_records=4000", "data.test_fraction=0.25"),
        )
        whole = {"learning_rate": (context.experiment.training.learning_rate or 0) / RATE}
        for name, form in forms.items():
            for epsilon in (None, 2.0) if name in ALSO_PRIVATE or "sgd" in name else (None,):
                privacy = {"name": "record_gaussian", "epsilon": epsilon} if epsilon else NONE
                training = whole if form["name"] != "subspace" or "directions" in form or "sgd" in name else {}
                training = training | ({"optimizer": "sgd"} if "sgd" in name else {})
                cells.add(f"{name}, epsilon {epsilon}", seed, partial(trial, context, privacy, form, **training))


SITES, EPSILONS = (6, 18, 50), (1.0, 2.0, 4.0)


def shared(args: argparse.Namespace) -> None:
    """Each site's own noise, and noise that they share in a secure sum, by ε and number of sites."""
    cells = Cells("privacy_shared", "the quick start: 40 sites of 100 records, and other numbers of such sites")
    runs = {"quick start": ()}
    runs |= {f"{n} sites": (f"partition.num_clients={n}", f"data.max_records={200 * n}") for n in SITES}
    for seed in args.seeds:
        for sites, more in runs.items():
            cells.add(f"none, {sites}", seed, partial(quickstart, [f"seed={seed}", "privacy.name=none", *more]))
            for name, epsilon in product(("shared_gaussian", "record_gaussian"), EPSILONS):
                privacy = (f"privacy.name={name}", f"privacy.epsilon={epsilon}")
                run = partial(quickstart, [f"seed={seed}", *privacy, *more])
                cells.add(f"{name}, epsilon {epsilon:g}, {sites}", seed, run)


def quickstart(changes: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        result = run(read("quickstart", ["baselines=[]", *changes]), Path(folder) / "run")
    return figures(result) | {"own test": 100 * result.scores.per_client_mean["accuracy"]}


DROPOUTS = {6: 1, 18: 2, 50: 5}
"""Sites of a secure sum, and how many of them it may lose."""
LEAVE, NUMBERS, BACKBONE = (0.05, 0.1, 0.02), 64, "none"
"""A site's probability to leave in a round; numbers of a term; the backbone that messages name."""


class Leaving:
    """An engine of sites without records, each with keys of its own. Some leave for good, at one exchange of the round."""

    def __init__(self, allowed: Tolerance, share: float, seed: int):
        names, random = [f"site-{place}" for place in range(allowed.invited)], np.random.default_rng(seed)
        keys = {name: Ed25519PrivateKey.generate() for name in names}
        known = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
        self.sites = {n: Member(n, SIMULATED, keys[n], known, lambda r: names, lambda n: allowed) for n in names}
        self.leaves = {n: int(random.integers(5)) for n in names if random.random() < share}
        self.terms = {name: random.integers(-(2**40), 2**40, NUMBERS) for name in names}

    def exchange(self, assignments: Mapping[str, bytes]) -> Iterator[Reply]:
        for name, body in assignments.items():
            message = decode_assignment(body, BACKBONE)
            if PHASES.index(message.method) >= self.leaves.get(name, len(PHASES)):
                yield Reply(name, None, "left")
                continue
            try:
                yield Reply(name, encode_assignment(self._answer(name, self.sites[name], message), BACKBONE))
            except PolicyError as error:
                yield Reply(name, None, str(error))

    def _answer(self, name: str, site: Member, message: Assignment) -> Assignment:
        asked, arrays, facts = message.facts, {}, {}
        match message.method:
            case secure_sum.KEYS:
                facts = {"advert": dict(site.advertise(1))}
            case secure_sum.SHARES:
                facts = {"shares": site.share(1, asked["adverts"])}
            case secure_sum.VECTOR:
                masked = site.mask(1, asked["shares"], self.terms[name].view(np.uint64))
                arrays = {secure_sum.MASKED: torch.from_numpy(masked.view(np.int64))}
            case secure_sum.CONSENT:
                facts = {"consent": {name: site.consent(1, asked["survivors"])}}
            case _:
                facts = {"revealed": site.reveal(1, asked["signatures"])}
        return Assignment(message.method, 1, arrays, facts)


def dropouts(args: argparse.Namespace) -> None:
    """Rounds saved and void by number of sites and share that leaves."""
    cells = Cells("privacy_dropouts", f"{NUMBERS} numbers; a site that leaves does so at one of five exchanges")
    for sites, lost in DROPOUTS.items():
        allowed = tolerance(shared_gaussian.Config(epsilon=2.0, max_lost=lost), sites)
        for share in LEAVE:
            for seed in args.seeds:
                cell = f"{sites} sites, {lost} may be lost, {100 * share:g} % leave"
                cells.add(cell, seed, partial(one_round, allowed, share, seed))


def one_round(allowed: Tolerance, share: float, seed: int) -> dict[str, float]:
    """A round's outcome. `saved`: its sum is known; then it is compared with the plain one. CPU: of all sites together."""
    engine, began = Leaving(allowed, share, seed), time.process_time()
    mechanism = SharedGaussian.__new__(SharedGaussian)
    mechanism.tolerance = allowed
    messages = _Messages(engine, 1, BACKBONE)  # type: ignore[arg-type]
    order = encode_assignment(Assignment("fedavg", 1, {}, {}), BACKBONE)
    try:
        summed, survivors = SecureSum(SIMULATED, {"": mechanism})._summed(
            messages, dict.fromkeys(engine.sites, order), {GRADIENT: NUMBERS}
        )
        assert np.array_equal(summed.view(np.int64), sum(engine.terms[name] for name in survivors))
        saved, came = 1.0, len(survivors)
    except VoidRoundError:
        saved, came = 0.0, 0
    found = {
        "saved": saved,
        "left": len(engine.leaves),
        "terms in the sum": came,
        "CPU seconds": time.process_time() - began,
    }
    return found | {"bytes up a site": messages.found.bytes_up / allowed.invited,
                    "bytes down a site": messages.found.bytes_down / allowed.invited}  # fmt: skip


ALSO_PRIVATE = ("whole prompt, 32 bit", "subspace 64, 32 bit", "subspace 256, 32 bit", "subspace 256, 8 bit")
PARTS = {"record": record, "client": client, "bytes": travelling, "shared": shared, "dropouts": dropouts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default="data", help="folder of medical_abstracts.parquet (bench/README.md)")
    args = parser.parse_args()
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
