"""A whole federation from Python: a recipe, two changes, a result."""

import tempfile
from pathlib import Path

from ficpd.experiments.config import parse
from ficpd.experiments.runner import run

RECIPE = """
[backbone]
name = "tiny"
[task]
name = "classification"
labels = { negative = "bad", positive = "good" }
[data]
source = "ratings"
columns = { text = "text", target = "polarity", domain = "domain" }
max_records = 400
[partition]
kind = "column"
column = "domain"
[federation]
num_rounds = 2
"""

out = Path(tempfile.mkdtemp()) / "run"
result = run(parse(RECIPE, "example", ["method.name=fedavg", "training.batch_size=4"]), out)
print("everyone's test:", result["metrics"]["global"])
print("bytes up per client and round:", result["bytes"]["up_per_client_round"])
print("library:", sorted(file.name for file in (out / "library").iterdir()))
