"""A whole federation in one call: a recipe, two changes, a table, a library."""

import tempfile
from pathlib import Path

import ficpd

folder = Path(tempfile.mkdtemp())
(folder / "recipe.toml").write_text("""
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
""")

run = ficpd.run(folder / "recipe.toml", folder / "run", changes=["method.name=fedavg", "training.batch_size=4"])
print(run)
print(run.to_frame().T)
print(ficpd.load_library(run.directory))
