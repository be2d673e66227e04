"""Seconds a round and peak memory by number of clients, 20 of them a round, on the tiny backbone; each size in a process of
its own. Clients keep a personal prompt between rounds, which lies on disk.

python bench/scale.py [--clients 100 1000 10000] [--engine ray]      3 minutes
"""

import argparse
import csv
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ficpd import rng
from ficpd.experiments.build import build_context
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import Runner, SimulatedClients
from measure import parse, quietness, save

COHORT, RECORDS = 20, 4
WORDS = {"good": ["good", "fine", "lovely", "bright"], "bad": ["bad", "dull", "awful", "grey"]}
RECIPE = f"""
[backbone]
name = "tiny"
dtype = "float32"
attention = "eager"
[prompt]
num_tokens = 10
[task]
name = "classification"
labels = {{ good = "good fine", bad = "bad dull" }}
[data]
keep = ["client"]
split_column = "split"
[partition]
kind = "column"
column = "client"
[method]
name = "local"
[training]
local_steps = 2
batch_size = 4
[federation]
clients_per_round = {COHORT}
"""


def table(file: Path, clients: int) -> None:
    """Writes sentences of ten words, `RECORDS` of each client for training and one for the test."""
    with file.open("w", encoding="utf-8", newline="") as out:
        lines = csv.writer(out)
        lines.writerow(["text", "target", "client", "split"])
        for place in range(clients * (RECORDS + 1)):
            label = ("good", "bad")[place % 2]
            drawn = rng.derive_seed("scale", place)
            words = [f"w{drawn >> (3 * i) & 4095}" for i in range(9)]
            text = " ".join([*words, WORDS[label][drawn % 4]])
            split = "test" if place < clients else "train"
            lines.writerow([text, label, f"client-{place % clients:05}", split])


def one(clients: int, rounds: int, engine: str, folder: Path) -> dict[str, float]:
    """A run of so many clients: seconds of its parts, and this process's peak memory."""
    table(folder / "records.csv", clients)
    changes = [f"data.source={folder / 'records.csv'}", f"federation.num_rounds={rounds}", f"engine.name={engine}"]
    began = time.process_time()
    context = build_context(parse(RECIPE, changes))
    directory = RunDir(folder / "run")
    directory.begin(context.experiment, context.experiment)
    runner = Runner(context, context.experiment.method, directory, SimulatedClients(None, True))
    runner.prepare()
    ready, wall, cpu = time.process_time() - began, [time.perf_counter()], [time.process_time()]
    for _, done in runner.train():
        assert done.updates >= min(COHORT, clients), done
        wall.append(time.perf_counter())
        cpu.append(time.process_time())
    sizes = [file.stat().st_size for file in (folder / "run" / "not-released").iterdir()]
    return {
        "cpu seconds before the first round": round(ready, 2),
        "seconds a round, median": round(_step(wall), 3),
        "cpu seconds a round, median": round(_step(cpu), 3),
        "peak MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, 1),
        "MB of states on disk": round(sum(sizes) / 1e6, 2),
    }


def _step(marks: list[float]) -> float:
    """The median step, without the first one."""
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(marks[1:]))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--clients", type=int, nargs="+", default=[100, 1000, 10000])
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--engine", default="in_process")
    options.add_argument("--one", action="store_true", help="print the figures of the first size, in this process")
    given = options.parse_args()
    if given.one:
        with tempfile.TemporaryDirectory(prefix="ficpd-scale-") as folder:
            print(json.dumps(one(given.clients[0], given.rounds, given.engine, Path(folder))))
        return
    quiet, found = quietness(), {}
    for clients in given.clients:
        command = [sys.executable, __file__, "--one", "--rounds", str(given.rounds), "--engine", given.engine]
        output = subprocess.run(
            [*command, "--clients", str(clients)], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        found[str(clients)] = json.loads(output.splitlines()[-1])
        print(clients, found[str(clients)], flush=True)
    name = "scale" if given.engine == "in_process" else f"scale-{given.engine}"
    save(
        name,
        {
            "engine": given.engine,
            "clients a round": COHORT,
            "rounds": given.rounds,
            "quiet": quiet,
            "by clients": found,
        },
    )


if __name__ == "__main__":
    main()
