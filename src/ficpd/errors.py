"""Exceptions and warnings of FICPD.

```
FicpdError
├── ConfigError        the experiment's TOML or --set: unknown key, unknown name, value out of range
│   └── PackageError   a package of an extra that is not installed
├── DataError          a file, row or column of the records
├── BackboneError      weights that cannot be loaded, a prompt that does not fit, another fingerprint
├── CodecError         an invalid message: truncated, wrong shape or type, not finite, too large
├── LibraryError       a prompt library that cannot be read or used here
├── PrivacyError       a guarantee that cannot hold: the method, plan or noise does not fit the mechanism
│   ├── BudgetError    a release beyond the budget; nothing was released
│   ├── PolicyError    a request that a site's policy refuses; nothing was released
│   └── LedgerError    a ledger of another run, or one that cannot be read
├── RunError           a run directory that cannot be started or resumed
└── SiteError          a site's file, socket or process; sites that do not connect
```

Each message states the given value, the expected value, and a remedy.
"""

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class FicpdError(Exception):
    """Base class of all errors that a user can fix."""


class ConfigError(FicpdError):
    pass


class PackageError(ConfigError):
    pass


class DataError(FicpdError):
    pass


class BackboneError(FicpdError):
    pass


class CodecError(FicpdError):
    pass


class LibraryError(FicpdError):
    pass


class PrivacyError(FicpdError):
    pass


class BudgetError(PrivacyError):
    pass


class PolicyError(PrivacyError):
    pass


class LedgerError(PrivacyError):
    pass


class RunError(FicpdError):
    pass


class SiteError(FicpdError):
    pass


class PrivacyWarning(UserWarning):
    """The guarantee is valid but weak, e.g. delta > 1/n."""


class BackboneWarning(UserWarning):
    """The backbone runs but does not read all of its input."""


REMEDIES = {
    errno.ENOSPC: "make room on the disk, or choose another place",
    errno.EDQUOT: "make room within your quota, or choose another place",
    errno.EFBIG: "raise the limit on the size of files, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a file stands where a folder is expected; choose another path",
    errno.EEXIST: "a file stands where a folder is expected; choose another path",
    errno.EISDIR: "a folder stands where a file is expected; choose another path",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
} | dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a place that this user may read and write")


def describe_os_error(error: OSError) -> str:
    """Describes an error of the system: the path, the reason and the next step.

    >>> describe_os_error(OSError(errno.ENAMETOOLONG, "File name too long", "runs/aaa"))
    'runs/aaa: File name too long; choose a shorter name'
    """
    place = "" if error.filename is None else f"{error.filename}: "
    remedy = REMEDIES.get(error.errno or 0)
    return f"{place}{error.strerror or error}" + (f"; {remedy}" if remedy else "")


def did_you_mean(kind: str, given: str, known: Iterable[str]) -> str:
    """Returns the error text for an unknown name, with the nearest known one.

    >>> did_you_mean("method", "fedvag", ["fedavg", "local"])
    "unknown method 'fedvag'; did you mean 'fedavg'? Known: fedavg, local"
    """
    known = sorted(known)
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {kind} {given!r}{hint} Known: {', '.join(known) or 'none'}"


@contextmanager
def needs(what: str, extra: str) -> Iterator[None]:
    """Raises `PackageError`, with the command to install it, where a package of this extra is missing.

    >>> with needs("engine 'flower'", "flower"):
    ...     raise ModuleNotFoundError(name="flwr.app")
    Traceback (most recent call last):
    ficpd.errors.PackageError: engine 'flower' needs the package flwr, which is not installed: pip install 'ficpd[flower]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package == "ficpd":
            raise
        raise PackageError(
            f"{what} needs the package {package}, which is not installed: pip install 'ficpd[{extra}]'"
        ) from error
