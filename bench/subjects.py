"""What the person as the unit costs against the record: accuracy and seconds at epsilon = 2, by records of a person.

python bench/subjects.py [--seeds 0 1 2]

The quick start's polarity with ten clients of 200 records, all of which join each step. Consecutive sentences are made one
person's: 2, 5 or 10 of them. All cells have the same test records: no block of ten is divided.
"""

import argparse
import csv
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from ficpd.data.sentence_ratings import read_ratings
from ficpd.experiments.build import build_context
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import no_progress, run_method
from measure import Cells, of_everyone, read

LARGEST = 10
SIZES = (2, 5, LARGEST)
RECORDS = 4000
CHANGES = (
    "partition.num_clients=10", "training.batch_size=1000", "data.split_column=split",
    "privacy.name=record_gaussian", "privacy.epsilon=2",
)  # fmt: skip


def table(path: Path, size: int, seed: int) -> Path:
    """Sentences with the person whom each is about, `size` of them for each, and the side of their block of ten."""
    rows = [row for of in read_ratings("polarity") for row in of.rows.values()]
    random = np.random.default_rng(seed)
    blocks = random.permutation(len(rows) // LARGEST)[: RECORDS // LARGEST]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "polarity", "person", "split"])
        for rank, block in enumerate(blocks.tolist()):
            for place in range(block * LARGEST, (block + 1) * LARGEST):
                row, side = rows[place], "test" if rank % 2 else "train"
                writer.writerow([row["text"], row["polarity"], place // size, side])
    return path


def trial(folder: Path, size: int | None, seed: int, private: bool) -> dict[str, float]:
    """One run. `size`: records of a person; None: no person is named."""
    source = table(folder / "records.csv", size or 1, seed)
    columns = '{text="text",target="polarity"' + (',subject="person"}' if size else "}")
    changes = [*CHANGES, f'data.source="{source}"', f"data.columns={columns}", f"seed={seed}"]
    changes += [f"privacy.max_records_per_subject={LARGEST}"] if private else ['privacy={name="none"}']
    context = build_context(read("quickstart", [*changes, "data.max_records=1000000"]))
    began = time.perf_counter()
    result = run_method(context, context.experiment.method, RunDir(folder / "run"), None, no_progress)
    found = {"accuracy": 100 * of_everyone(result)["accuracy"], "seconds": time.perf_counter() - began}
    found["epsilon"] = result.privacy.epsilon or 0.0
    groups = result.privacy.group_epsilon
    return found | {f"epsilon, {size} records of a person": cost for size, cost in groups.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    cells = Cells("subjects", "polarity, 10 clients of 200 records, the quick start's ficpd, 5 rounds of all records")
    for seed in args.seeds:
        runs = {"no privacy": (None, False), "the record": (None, True)}
        runs |= {f"the person, {size} records each": (size, True) for size in SIZES}
        for cell, (size, private) in runs.items():
            with tempfile.TemporaryDirectory() as folder:
                cells.add(cell, seed, partial(trial, Path(folder), size, seed, private))


if __name__ == "__main__":
    main()
