"""Everything that FICPD raises on purpose.

```
FicpdError
├── ConfigError        the experiment's TOML or --set: unknown key, unknown name, value out of range
├── DataError          a file, row or column of the records
├── BackboneError      weights that cannot be had, a prompt that does not fit, another fingerprint
├── CodecError         bytes that are not an update: truncated, wrong shape or type, not finite, too large
├── LibraryError       a prompt library that cannot be read or used here
├── PrivacyError       a guarantee that cannot be given: a method, plan or noise that does not fit the mechanism
│   ├── BudgetError    a release that the budget does not pay for; nothing was released
│   ├── PolicyError    what a site's own policy does not allow; nothing was released
│   └── LedgerError    a ledger that is another run's, or cannot be read
├── RunError           a run directory that cannot be started or resumed
└── SiteError          a site's file, socket or process; a federation whose sites do not come
```

Each message says what was given, what was expected, and what to do.
"""

import difflib
from collections.abc import Iterable


class FicpdError(Exception):
    """Base of all errors that a user can mend."""


class ConfigError(FicpdError):
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
    """A guarantee that holds as stated and says less than it seems to."""


class BackboneWarning(UserWarning):
    """A backbone that runs, and reads less than was written."""


def did_you_mean(kind: str, given: str, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist, with the nearest one that does.

    >>> did_you_mean("method", "fedvag", ["fedavg", "local"])
    "unknown method 'fedvag'; did you mean 'fedavg'? Known: fedavg, local"
    """
    known = sorted(known)
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {kind} {given!r}{hint} Known: {', '.join(known)}"
