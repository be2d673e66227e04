"""Copies the library of a private run, which its guarantee covers, and nothing else."""

import shutil
from pathlib import Path

from ficpd.errors import RunError
from ficpd.experiments.results import RunResult
from ficpd.experiments.run_directory import RunDir
from ficpd.library.card import CARD, PAGE, TENSORS, began_line, read_card, weakness
from ficpd.storage import atomic_write


def publish(run: Path, out: Path) -> None:
    """Copies the library of a finished private run to `out`.

    Raises `RunError` for a run that is not finished, has no guarantee, or has noise from the experiment's seed, for a
    library that was changed since or began with a prompt without a guarantee, and for an `out` that is not empty.
    """
    result = _finished(run)
    card = read_card(run / "library" / CARD)
    if why := weakness(card):
        raise RunError(f"{run / 'library'}: {why}. If those records are public, copy the library yourself")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} is not empty. Choose another folder")
    (out / "library").mkdir(parents=True)
    for name in (TENSORS, CARD, PAGE):
        shutil.copyfile(run / "library" / name, out / "library" / name)
    atomic_write(
        out / "README.md",
        f"# What {result.method} released\n\n`library/` is made of released updates only: {result.privacy.guarantee}. "
        f"Test scores, queries, personal prompts and the ledger stay in the run's directory.\n{began_line(card)}",
    )


def _finished(run: Path) -> RunResult:
    result = RunDir(run).result() if run.is_dir() else None
    if result is None:
        raise RunError(f"{run} holds no finished run. Finish it (ficpd run ... --resume), or name another directory")
    privacy = result.privacy
    if privacy.epsilon is None:
        raise RunError(f"what {run} released carries no guarantee. Set [privacy], or copy the library yourself")
    if privacy.noise == "simulated" or privacy.rehearsed:
        raise RunError(
            f"the noise of {run} comes from a seed, and a correct guess of the seed removes the noise. Run again with "
            "privacy.noise = 'cryptographic'"
        )
    return result
