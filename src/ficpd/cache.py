"""The one folder outside the user's own that FICPD writes to: downloads, converted weights, measured speeds.

All of it may be deleted. Writers write beside and rename, so that a second process finds the old file or the new one.
"""

import os
from pathlib import Path


def folder() -> Path:
    """`$FICPD_CACHE`, else `$XDG_CACHE_HOME/ficpd`, else `~/.cache/ficpd`."""
    if own := os.environ.get("FICPD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ficpd"
