"""What the federation itself costs beside the model: 500 clients of the tiny backbone, milliseconds and memory by round.

python bench/overhead.py [--rounds 24]      a minute
"""

import argparse
import gc
import statistics
import time
from pathlib import Path

from ficpd.backbones.query_engine import QueryEngine
from ficpd.experiments.build import build_context
from ficpd.federation import simulation
from ficpd.federation.rounds import RoundSchedule, run_rounds
from ficpd.methods import fedavg
from ficpd.optimizers import LocalTrainingConfig
from ficpd.types import FederationInfo
from measure import parse, quietness, save

TINY = """
[backbone]
name = "tiny"
[task]
name = "classification"
labels = { negative = "bad", positive = "good" }
[data]
source = "ratings"
columns = { text = "text", target = "polarity" }
max_records = 6000
[partition]
kind = "iid"
num_clients = 500
[training]
local_steps = 1
batch_size = 2
"""


def resident_mb() -> float:
    """This process's resident memory (Linux)."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096 / 1e6


def overhead(rounds: int) -> dict:
    """Milliseconds per client and round that are not the model's, with 500 tiny clients; and memory over the rounds."""
    built = build_context(parse(TINY))
    model, clients = _Timed(built.model.backbone), built.clients()
    method = fedavg.build(fedavg.Config(), LocalTrainingConfig(local_steps=1, batch_size=2, learning_rate=0.01))
    engine = simulation.build(simulation.Config(lock_step=64), method, clients, model)
    cards = [client.card for client in clients.values()]
    state = method.init(FederationInfo(built.start, cards, rounds, len(cards), 0))
    milliseconds, memory, began = [], [], time.perf_counter()
    for _, _ in run_rounds(method, engine, model, state, RoundSchedule(rounds, len(cards), 0), built.compression):
        milliseconds.append(1000 * (time.perf_counter() - began - model.seconds) / len(cards))
        gc.collect()
        memory.append(resident_mb())
        model.seconds, began = 0.0, time.perf_counter()
    return {
        "clients": len(cards),
        "milliseconds per client and round, median": round(statistics.median(milliseconds[1:]), 3),
        "resident MB after each round": [round(m, 1) for m in memory],
    }


class _Timed(QueryEngine):
    """Adds up the seconds spent in the backbone's forward and backward (tiny's own cost is part of the model's)."""

    seconds = 0.0

    def _forward(self, queries, part):
        began = time.perf_counter()
        try:
            return super()._forward(queries, part)
        finally:
            self.seconds += time.perf_counter() - began


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=24)
    rounds = options.parse_args().rounds
    save("overhead", {"quiet": quietness(), **overhead(rounds)})


if __name__ == "__main__":
    main()
