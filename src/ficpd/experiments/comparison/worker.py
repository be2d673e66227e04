"""A worker process: jobs come in as JSON lines, events go out as JSON lines; when its input ends, so does it.

    python -m ficpd.experiments.comparison.worker FOLDER [FOLDER OF MODULES ...]

In: {"key", "experiment": TOML, "ground"}. Out: {"key", "method", "done", "planned", "figures"} for a round,
{"warning": text}, and {"key", "status", "reason"} once `FOLDER/KEY.json` is written. Nothing else may write to the standard
output, so it is led to the standard error.
"""

import json
import os
import queue
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any, TextIO

from ficpd import __version__
from ficpd.errors import BackboneError, ConfigError, FicpdError, PrivacyError
from ficpd.experiments.comparison import SCHEMA
from ficpd.experiments.comparison.run_cell import ContextCache, Outcome, run_cell
from ficpd.experiments.config import parse
from ficpd.registry import search_in
from ficpd.storage import atomic_write

CANNOT = (ConfigError, PrivacyError, BackboneError)
"""The file as a whole was checked before: what is raised now says that this method cannot do what the cell asks."""


def main(folder: Path) -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    _threads()
    jobs: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    said: set[str] = set()

    def warn(message: Warning | str, *where: object, **more: object) -> None:
        if str(message) not in said:
            said.add(str(message))
            _say(out, {"warning": str(message)})

    warnings.showwarning = warn
    worlds = ContextCache()
    while True:
        job = jobs.get()
        outcome = run_job(job, folder, worlds, out)
        atomic_write(folder / f"{job['key']}.json", json.dumps(outcome, indent=1) + "\n")
        _say(out, {name: outcome[name] for name in ("key", "status", "reason")})


def run_job(job: dict[str, Any], folder: Path, worlds: ContextCache, out: TextIO) -> Outcome:
    """The run's outcome; one that raised is an outcome, too, and its traceback stands in `KEY.log`."""
    key = job["key"]

    def progress(method: str, done: int, planned: int, figures: dict[str, float]) -> None:
        _say(out, {"key": key, "method": method, "done": done, "planned": planned, "figures": figures})

    try:
        experiment = parse(job["experiment"], f"{key}.toml")
        outcome = run_cell(experiment, key, job["ground"], folder, worlds, progress)
    except CANNOT as error:
        return result_event(key, "refused", str(error))
    except FicpdError as error:
        return result_event(key, "failed", str(error))
    except Exception as error:
        atomic_write(folder / f"{key}.log", traceback.format_exc())
        return result_event(key, "failed", f"{type(error).__name__}: {error} (see {key}.log)")
    (folder / f"{key}.log").unlink(missing_ok=True)
    return outcome


def result_event(key: str, status: str, reason: str) -> Outcome:
    return {"schema": SCHEMA, "ficpd": __version__, "key": key, "status": status, "reason": reason}


def _threads() -> None:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def _listen(jobs: queue.Queue[dict[str, Any]]) -> None:
    """The end of the input means that nobody waits for this process any more; what it has begun can be gone on with."""
    for line in sys.stdin:
        jobs.put(json.loads(line))
    os._exit(0)


def _say(out: TextIO, event: dict[str, Any]) -> None:
    out.write(json.dumps(event) + "\n")


if __name__ == "__main__":
    for place in sys.argv[2:]:
        search_in(Path(place))
    main(Path(sys.argv[1]))
