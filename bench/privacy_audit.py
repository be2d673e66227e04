"""How far attacks get: one small site whose prompt has memorised its records, without privacy and at ε = 2.

python bench/privacy_audit.py [--seeds 0 1 2] [--canaries 100]      MiniLM; 20 minutes a seed

200 members, 1,000 label-matched non-members, four shadow prompts; the library's prompt is attacked, as a thief would.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from ficpd.experiments.audit import audit_run
from ficpd.experiments.runner import run
from measure import Cells, of_everyone, parse

RECIPE = """
name = "overfitted"
[backbone]
name = "minilm"
options = { max_tokens = 48 }
[prompt]
num_tokens = 20
enters_at = 4
[task]
name = "classification"
instruction = "The sentiment of this sentence is"
labels = { negative = "negative", positive = "positive" }
tuned_head = true
[data]
source = "ratings"
columns = { text = "text", target = "polarity" }
max_records = 250
test_fraction = 0.2
[partition]
kind = "iid"
num_clients = 1
[method]
name = "fedavg"
[training]
local_steps = 10
batch_size = 40
decay = 0.3
[federation]
num_rounds = 16
"""
PRIVATE = ("privacy.name=record_gaussian", "privacy.epsilon=2")


def one(seed: int, changes: tuple[str, ...], canaries: int) -> dict[str, float]:
    """Train, attack; the figures of both."""
    with tempfile.TemporaryDirectory() as folder:
        result = run(parse(RECIPE, [f"seed={seed}", *changes]), Path(folder) / "run")
        audit = audit_run(Path(folder) / "run", shadows=4, members=1000, canaries=canaries, seed=seed)
    return {
        "accuracy on test": of_everyone(result)["accuracy"],
        "best advantage": audit.advantage,
        "at least": audit.advantage_interval[0],
        "at most": audit.advantage_interval[1],
        "best auc": max(attack.auc for attack in audit.attacks.values()),
        "best tpr at 1 %": max(attack.tpr[0.01] or 0.0 for attack in audit.attacks.values()),
        "epsilon": result.privacy.epsilon or 0.0,
        "epsilon at least": max((bound.epsilon for bound in audit.bounds.values()), default=0.0),
        "alarm": float(audit.alarm),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--canaries", type=int, default=0, help="planted records; they cost a second training")
    parser.add_argument("--only", choices=("no privacy", "epsilon 2"))
    given = parser.parse_args()
    cells = Cells(
        "privacy_audit", "200 members, 1,000 non-members, 4 shadows; intervals at 95 % of each seed's own audit"
    )
    for name, changes in (("no privacy", ()), ("epsilon 2", PRIVATE)):
        for seed in given.seeds if given.only in (None, name) else []:
            cells.add(name, seed, partial(one, seed, changes, given.canaries))


if __name__ == "__main__":
    main()
