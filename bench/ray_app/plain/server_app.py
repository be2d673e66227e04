"""Flower's own FedAvg. When each round began and ended is written down."""

import json
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from plain.records import VIRTUAL

app = ServerApp()


class Timed(FedAvg):
    """FedAvg that notes the time at which each round's training begins and is over."""

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        self.times: list[list[float]] = []

    def configure_train(self, server_round, arrays, config, grid):
        self.times.append([time.time()])
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        failed = sum(reply.has_error() for reply in replies)
        self.times[-1] += [time.time(), len(replies) - failed]
        return super().aggregate_train(server_round, replies)


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    cohort, width = int(config["cohort"]), 384
    all_of_them = len(list(grid.get_node_ids()))
    prompt = torch.randn(VIRTUAL, width, generator=torch.Generator().manual_seed(0)) * 0.05
    strategy = Timed(
        fraction_train=cohort / max(all_of_them, cohort), fraction_evaluate=0.0, min_train_nodes=cohort,
        min_available_nodes=cohort,
    )  # fmt: skip
    strategy.start(grid, ArrayRecord({"prompt": prompt}), num_rounds=int(config["rounds"]))
    Path(str(config["times"])).write_text(json.dumps(strategy.times), encoding="utf-8")
