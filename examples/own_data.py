"""Your own table: four hospitals in one CSV file, one client each, and what the library says of a new note."""

import csv
import tempfile
from pathlib import Path

from ficpd.experiments.config import parse
from ficpd.experiments.runner import run
from ficpd.library.session import open_library, predicted, texts_as_records

folder = Path(tempfile.mkdtemp())
notes = {"cardio": "chest pain and a fast pulse", "neuro": "headache and a numb hand"}
with open(folder / "notes.csv", "w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["note", "department", "site"])
    for number in range(80):
        department = "cardio" if number % 2 else "neuro"
        table.writerow([f"{notes[department]}, day {number}", department, f"hospital {number % 4}"])

RECIPE = f"""
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
"""

result = run(parse(RECIPE, "own data"), folder / "run")
print("accuracy by hospital:", {name: score["accuracy"] for name, score in result["metrics"]["per_client"].items()})
print(predicted(open_library(folder / "run"), texts_as_records(["pulse and pain"]), None))
