"""A federation over Flower: is it the same one, what does it cost, what goes over the wire, and where do its seconds go.

    python bench/deploy.py same            in process, Flower's simulation, Flower's deployment: the same library?
    python bench/deploy.py ray             whole simulations against Flower's on Ray, seconds and memory
    python bench/deploy.py crowd           50 to 500 clients in one process
    python bench/deploy.py bytes round     a real SuperLink: bytes on the sockets, and a round's seconds

Needs `pip install "flwr[simulation]"`. Each part saves `results/deploy_PART.json`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ficpd.experiments.config import Experiment
from measure import Runs, before, parse, quietness, ratio, save

DOMAINS = ["editorials", "films", "products", "tweets"]
RATED = """
name = "bench"
[backbone]
name = "minilm"
dtype = "float32"
attention = "eager"
[prompt]
num_tokens = 10
[task]
name = "classification"
instruction = "The sentiment of this sentence is"
labels = { negative = "negative", positive = "positive" }
[data]
source = "ratings"
columns = { text = "text", target = "polarity", domain = "domain" }
max_records = 400
[partition]
kind = "column"
column = "domain"
[method]
name = "fedavg"
[training]
local_steps = 2
batch_size = 8
[federation]
num_rounds = 2
"""
PRIVATE = ('privacy.name="record_gaussian"', "privacy.epsilon=4.0")
TINY, SHORT = ("backbone.name=tiny",), ("backbone.options.max_tokens=32",)


def rated(*changes: str) -> Experiment:
    return parse(RATED, changes)


# ---------------------------------------------------------------- the same


def same(folder: Path) -> dict[str, Any]:
    """The largest difference of any number of the library to that of the run in process, over the largest number."""
    from deploy_net import flower_simulation, network
    from ficpd.experiments.runner import run

    cells = [(b, m, "float32") for b in ("tiny", "minilm") for m in ("fedavg", "ficpd", "fpl")]
    cells += [("minilm", m, "bfloat16") for m in ("fedavg", "ficpd", "fpl")]
    found: dict[str, Any] = {}
    with network(DOMAINS, folder / "net") as net:
        for backbone, method, dtype in cells:
            name = f"{backbone} {dtype} {method}"
            sized = TINY if backbone == "tiny" else SHORT
            experiment = rated(f"method.name={method}", f"backbone.dtype={dtype}", *sized, *PRIVATE)
            here = folder / name.replace(" ", "-")
            run(experiment, here / "run")
            known = _library(here / "run")
            flower_simulation.run(experiment, here / "simulated", resume=False)
            found[name] = {
                "moved": _apart(dict.fromkeys(known, known["start"]), known),
                "simulation": _apart(_library(here / "simulated"), known),
                "prompts": len(known) - 1,
            }
            if dtype == "float32":
                net.run(experiment, here / "deployed")
                found[name]["deployment"] = _apart(_library(here / "deployed"), known)
            print(name, found[name], flush=True)
    return {"setting": "ratings, 4 clients, 2 rounds of 2 steps of 8, epsilon 4 per record, seeded noise", **found}


def _library(run: Path) -> dict:
    from ficpd.library.library import PromptLibrary

    return {name: prompt.vectors_PD for name, prompt in PromptLibrary.load(run).candidates().items()}


def _apart(found: dict, known: dict) -> float:
    """The largest difference relative to the largest number. Raises if one has a prompt that the other lacks."""
    assert found.keys() == known.keys(), (list(found), list(known))
    largest = max(float(vectors.abs().max()) for vectors in known.values())
    return max(float((found[name] - known[name]).abs().max()) for name in known) / largest


# ---------------------------------------------------------------- ray and crowd

RAY_CELLS = ("Ray fp32, defaults", "Ray bf16, 2 actors", "ours, lock step bf16", "ours, one by one bf16")


WHOLE = (("whole", "seconds", "later rounds"), ("whole cpu", "cpu", "cpu of later rounds"))


def ray(folder: Path, repeats: int, rounds: dict[int, int]) -> None:
    """All cells in turn, `repeats` times, saved as they come: a later call goes on. `whole` and `whole cpu`: what 10 rounds
    would take, from the rounds that were run."""
    from deploy_ray import CLIENTS, COHORT, STEPS, one

    setting = (
        f"{CLIENTS} clients, {COHORT} a round, {STEPS} steps of random rows of 42 tokens; rounds by rows: {rounds}"
    )
    runs = before("deploy_ray", setting)
    for turn in map(str, range(repeats)):
        for rows, number in rounds.items():
            for cell in RAY_CELLS:
                of_cell = runs.setdefault(f"{rows} rows, {cell}", {})
                if turn in of_cell:
                    continue
                done = {"quiet": float(quietness()["quiet"]), **one(cell, rows, number, folder)}
                of_cell[turn] = done | {
                    whole: round(done[of] + (10 - number) * done[later], 2) for whole, of, later in WHOLE
                }
                print(f"{turn} {rows} rows, {number} rounds, {cell:24} {of_cell[turn]}", flush=True)
                over = {f"{r} rows": _over(runs, f"{r} rows, ", RAY_CELLS[2]) for r in rounds}
                save("deploy_ray", {"setting": setting, "over lock step": over, "runs": runs})


def _over(runs: Runs, rows: str, under: str) -> dict[str, Any]:
    """Each cell over one of them, turn by turn."""
    whole = {cell: runs.get(rows + cell, {}) for cell in RAY_CELLS}
    kinds = ("whole", "whole cpu", "later rounds", "cpu of later rounds", "peak_mb")
    found: dict[str, Any] = {kind: {} for kind in kinds}
    for cell in RAY_CELLS:
        turns = sorted(whole[cell].keys() & whole[under].keys())
        for kind in kinds if turns and cell != under else ():
            found[kind][cell] = ratio({c: [whole[c][t][kind] for t in turns] for c in (cell, under)}, cell, under)
    return found


def crowd() -> dict[str, Any]:
    """A process for each number of clients, all of whom take part in every round: one step of 2 records."""
    found: dict[str, Any] = {
        "quiet": quietness(),
        "setting": "iid ratings, 12 records a client, one step of 2 records, fedavg, lock step of 64",
    }
    for backbone in ("tiny", "minilm"):
        found[backbone] = {}
        for clients in (50, 100, 200, 500):
            command = [sys.executable, __file__, "crowd-of", "--backbone", backbone, "--clients", str(clients)]
            env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            found[backbone][clients] = json.loads(done.stdout.splitlines()[-1])
            print(backbone, clients, found[backbone][clients], flush=True)
    return found


def crowd_of(backbone: str, clients: int, rounds: int = 4) -> dict[str, float]:
    """This process's figures, the first round left out of the seconds."""
    from ficpd.experiments.build import build_context
    from ficpd.federation import simulation
    from ficpd.federation.rounds import RoundSchedule, run_rounds
    from ficpd.methods import fedavg
    from ficpd.types import FederationInfo

    sized = TINY if backbone == "tiny" else (*SHORT, "backbone.dtype=bfloat16")
    dealt = (f'partition={{ kind = "iid", num_clients = {clients} }}', f"data.max_records={16 * clients}")
    context = build_context(rated(*sized, *dealt, "training.local_steps=1", "training.batch_size=2"))
    method, members = fedavg.build(fedavg.Config(), context.experiment.training), context.clients()
    engine = simulation.build(simulation.Config(lock_step=64), method, members, context.model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    state = method.init(FederationInfo(context.start, [c.card for c in members.values()], rounds, clients, 0))
    seconds, cpu, began, used = [], [], time.perf_counter(), time.process_time()
    for _ in run_rounds(method, engine, context.model, state, RoundSchedule(rounds, clients, 0), context.compression):
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
        began, used = time.perf_counter(), time.process_time()
    return {
        "seconds a round": round(statistics.median(seconds[1:]), 3),
        "cpu seconds a round": round(statistics.median(cpu[1:]), 3),
        "first round": round(seconds[0], 3),
        "peak MB before the first round": round(before),
        "peak MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
    }


# ---------------------------------------------------------------- a real SuperLink

TWO = ('data.where={ domain = ["films", "tweets"] }',)
ON_THE_WIRE = {
    "64 numbers of 8 bits": ('compression={ name = "subspace", dimension = 64, bits = 8 }',),
    "10 tokens of 384, float32": (),
}


def bytes_on_the_wire(net: Any, folder: Path) -> dict[str, Any]:
    """Per site and round: the codec's count, the site's Unix socket (HTTP and all), SuperLink's port (TLS, polls)."""
    idle, began = net.port.total(), time.time()
    time.sleep(15)
    spent = [after - before for after, before in zip(net.port.total(), idle, strict=True)]
    sites = len(net.sockets)
    found: dict[str, Any] = {"an idle SuperNode, bytes a second [up, down]": [
        round(s / (time.time() - began) / sites) for s in spent
    ]}  # fmt: skip
    for name, changes in ON_THE_WIRE.items():
        ran = net.run(rated(*SHORT, *TWO, *changes, "federation.num_rounds=4"), folder / f"bytes-{len(found)}")
        lines = []
        for number, line in enumerate(ran.rounds):
            calls = ran.calls(number)
            before = ran.marks[number - 1] if number else None
            asked = line["clients"]
            lines.append({
                "codec": [line["bytes_up"] / asked, line["bytes_down"] / asked],
                "unix socket": [sum(c.down for c in calls) / asked, sum(c.up for c in calls) / asked],
                "superlink": before and [(ran.marks[number].up - before.up) / asked,
                                         (ran.marks[number].down - before.down) / asked],
                "seconds": round(line["seconds_train"], 2),
                "calls": len(calls),
            })  # fmt: skip
        found[name] = {"rounds, per site [up, down]": lines}
        print(name, json.dumps(lines, indent=1), flush=True)
    return found


def round_seconds(net: Any, folder: Path, repeats: int = 2, rounds: int = 5) -> dict[str, Any]:
    """Where a round's seconds go, with our pull loop as it is and with one that looks as seldom as Flower's own."""
    found: dict[str, Any] = {"sites": len(net.sockets), "poll 0.2 s": [], "poll 3 s": []}
    for turn in range(repeats):
        for poll in (0.2, 3.0):
            experiment = rated(*TINY, *TWO, f"federation.num_rounds={rounds}")
            ran = net.run(experiment, folder / f"round-{turn}-{poll}", poll)
            lines = [_phases(ran, number) for number in range(rounds)]
            found[f"poll {poll:g} s"].append({"whole run": round(ran.seconds, 1), "rounds": lines})
            print(poll, json.dumps(found[f"poll {poll:g} s"][-1]), flush=True)
    found["mean over rounds"] = {
        name: {
            key: round(statistics.mean(line[key] for run in runs for line in run["rounds"]), 2)
            for key in runs[0]["rounds"][0]
        }
        for name, runs in found.items()
        if name.startswith("poll")
    }
    return found


def _phases(ran: Any, number: int) -> dict[str, float]:
    """Of the site that answered last: the one that the round waited for."""
    begin, end = ran.begun[number], ran.marks[number].at
    last = max(ran.calls(number), key=lambda call: call.answered)
    return {
        "round": round(end - begin, 2),
        "until the ClientApp's process starts": round(last.started - begin, 2),
        "until it asks the site": round(last.accepted - last.started, 2),
        "the site": round(last.answered - last.accepted, 2),
        "until the coordinator has it": round(end - last.answered, 2),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parts", nargs="+", choices=["same", "ray", "crowd", "bytes", "round", "crowd-of"])
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--rounds", type=int, default=10, help="of `ray`, at 16 rows")
    options.add_argument("--rounds-small", type=int, default=10, help="of `ray`, at 2 rows")
    options.add_argument("--backbone", default="tiny")
    options.add_argument("--clients", type=int, default=500)
    given = options.parse_args()
    if given.parts == ["crowd-of"]:
        print(json.dumps(crowd_of(given.backbone, given.clients)))
        return
    with tempfile.TemporaryDirectory(prefix="fb-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        if "same" in given.parts:
            save("deploy_same", same(folder))
        if "ray" in given.parts:
            ray(folder, given.repeats, {2: given.rounds_small, 16: given.rounds})
        if "crowd" in given.parts:
            save("deploy_crowd", crowd())
        if {"bytes", "round"} & set(given.parts):
            from deploy_net import network

            with network(["films", "tweets"], folder / "n") as net:
                if "bytes" in given.parts:
                    save("deploy_bytes", bytes_on_the_wire(net, folder))
                if "round" in given.parts:
                    save("deploy_round", round_seconds(net, folder, given.repeats))


if __name__ == "__main__":
    main()
