"""Your own table: four hospitals in one CSV file, one client each, and the library's answer to a new note."""

import tempfile
from pathlib import Path

import pandas as pd

import ficpd

folder = Path(tempfile.mkdtemp())
notes = {"cardio": "chest pain and a fast pulse", "neuro": "headache and a numb hand"}
departments = ["neuro", "cardio"] * 40
table = {"department": departments, "note": [f"{notes[name]}, day {day}" for day, name in enumerate(departments)]}
pd.DataFrame({**table, "site": [f"hospital {day % 4}" for day in range(80)]}).to_csv(folder / "notes.csv", index=False)

(folder / "recipe.toml").write_text(f"""
[backbone]
name = "tiny"
[task]
name = "classification"
instruction = "this note belongs to"
labels = {{ cardio = "chest pulse", neuro = "headache hand" }}
[data]
source = "{folder / "notes.csv"}"
columns = {{ text = "note", target = "department", site = "site" }}
[partition]
kind = "column"
column = "site"
[federation]
num_rounds = 3
""")

run = ficpd.run(folder / "recipe.toml", folder / "run")
print(run.to_frame()[["accuracy_global", "accuracy_own", "bytes_up"]])
library = ficpd.load_library(run.directory)
print(library.predict(["pulse and pain"]), library.predict(["pulse and pain"], scores=True), sep="\n")
