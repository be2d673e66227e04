"""A simulation in one process against Flower's on Ray, as an ordinary app (`ray_app/`) runs it: the same work on random
records, whole processes, from their start to their end. `deploy.py ray` calls it.

    python bench/deploy_ray.py ours --rows 16 --lock-step 64 --rounds 10 --times FILE     one of ours, alone
"""

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from ray_app.plain.records import CLASSES, RECORDS, VIRTUAL, records_of
from watched import watched

CLIENTS, COHORT, STEPS = 100, 20, 5
APP = Path(__file__).parent / "ray_app"
OURS = f"""
[backbone]
name = "minilm"
dtype = "bfloat16"
attention = "eager"
[prompt]
num_tokens = {VIRTUAL}
enters_at = 0
[task]
name = "classification"
labels = {{ negative = "negative", positive = "positive" }}
[training]
local_steps = {STEPS}
"""


def ours(rows: int, lock_step: int, rounds: int, times: Path) -> None:
    from ficpd.experiments.build import build_context_without_records
    from ficpd.federation import simulation
    from ficpd.federation.rounds import RoundSchedule, run_rounds
    from ficpd.methods import fedavg
    from ficpd.types import FederationInfo
    from measure import parse

    context = build_context_without_records(parse(OURS, [f"training.batch_size={rows}"], records=False))
    clients = _clients(context)
    method = fedavg.build(fedavg.Config(), context.experiment.training)
    engine = simulation.build(simulation.Config(lock_step=lock_step), method, clients, context.model)
    cards = [client.card for client in clients.values()]
    state, found, began = method.init(FederationInfo(context.start, cards, rounds, COHORT, 0)), [], time.time()
    for _, done in run_rounds(
        method, engine, context.model, state, RoundSchedule(rounds, COHORT, 0), context.compression
    ):
        found.append([began, time.time(), done.updates])
        began = time.time()
    times.write_text(json.dumps(found), encoding="utf-8")


def _clients(context) -> dict:
    """Clients whose records are the plain app's."""
    from ficpd.types import ClientData, EncodedInput, Record

    record = Record("random", {"text": "random", "target": "positive"})
    shards = {f"client-{i:02}": ClientData([record] * RECORDS, [], {}) for i in range(CLIENTS)}
    clients = replace(context, shards=shards, group_of=dict.fromkeys(shards, "")).clients()
    encoded = context.task.encode([record], context.model.backbone, context.start)
    assert encoded.readout_CD is not None
    assert len(encoded.readout_CD) == CLASSES
    for number, client in enumerate(clients.values()):
        tokens, targets = records_of(number)
        items = tuple((EncodedInput(ids, len(ids)),) for ids in tokens)
        client.set_encoding("train", replace(encoded, items=items, targets=targets))
    return clients


def one(cell: str, rows: int, rounds: int, folder: Path) -> dict[str, float]:
    """One run of a cell: wall seconds, peak memory, and the seconds of its rounds."""
    times = folder / "times.json"
    times.unlink(missing_ok=True)
    with ExitStack() as stack:
        if cell.startswith("ours"):
            command = [sys.executable, __file__, "ours", "--rows", str(rows), "--rounds", str(rounds)]
            command += ["--times", str(times), "--lock-step", "1" if "one by one" in cell else "64"]
            more = {"HF_HUB_OFFLINE": "1"}
        else:
            command, more = _flower(cell, rows, rounds, times, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        # Threads that spin while they wait for one another slow a busy machine several times, whoever's they are.
        found = watched(command, {**os.environ, **more, "OMP_WAIT_POLICY": "passive"}, folder / "log")
    marks = json.loads(times.read_text())
    assert [answered for _, _, answered in marks] == [COHORT] * rounds, marks
    times_of, used = zip(*found.pop("looks"), strict=True)
    (begun, first), last, number = marks[0][:2], marks[-1][1], max(rounds - 1, 1)
    return {
        **found,
        "first round": round(first - begun, 2),
        "later rounds": round((last - first) / number, 2),
        "cpu of later rounds": round(float(np.diff(np.interp([first, last], times_of, used))[0]) / number, 2),
        "load": round(os.getloadavg()[0], 1),
    }


def _flower(cell: str, rows: int, rounds: int, times: Path, home: Path) -> tuple[list[str], dict[str, str]]:
    from ficpd.backbones import catalog, weights
    from ficpd.deployment.flower_cli import clean_env, flower_binary, free_ports

    bfloat16 = "bf16" in cell
    federation = f"num-supernodes={CLIENTS}" + (" client-resources-num-cpus=1" if bfloat16 else "")
    given = {
        "folder": json.dumps(str(weights.resolve(catalog.NAMED["minilm"].weights).folder)),
        "times": json.dumps(str(times)), "bfloat16": str(bfloat16).lower(), "rounds": rounds, "cohort": COHORT,
        "rows": rows, "steps": STEPS,
    }  # fmt: skip
    config = home / "run.toml"
    config.write_text("".join(f"{key} = {value}\n" for key, value in given.items()))
    ports = ("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "FLWR_LOCAL_CONTROL_API_PORT")
    # Ray's workers are 15 nicer than whoever starts them, which on a busy machine would slow this cell alone.
    more = {"FLWR_HOME": str(home / "flower"), "RAY_worker_niceness": "0"} | dict(
        zip(ports, map(str, free_ports(2)), strict=True)
    )
    command = [flower_binary("flwr"), "run", str(APP), "--federation-config", federation, "--run-config", str(config)]
    return [*command, "--stream"], clean_env(more)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=["ours"])
    options.add_argument("--rows", type=int, default=16)
    options.add_argument("--lock-step", type=int, default=64)
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--times", type=Path, required=True)
    given = options.parse_args()
    ours(given.rows, given.lock_step, given.rounds, given.times)


if __name__ == "__main__":
    main()
