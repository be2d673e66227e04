"""Federated In-Context Prompt Distillation: adapt one frozen backbone together, share only soft prompts.

    import ficpd

    run = ficpd.run("quickstart", changes=["federation.num_rounds=2"])
    print(run.to_frame())
    ficpd.load_library(run.directory).predict(["a quiet, lovely film"])  # ['positive']

Each name is imported at its first use, so that `import ficpd` loads neither torch nor pydantic.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ficpd.experiments.api import compare as compare
    from ficpd.experiments.api import run as run
    from ficpd.experiments.config import Experiment as Experiment
    from ficpd.federation.method import Method as Method
    from ficpd.interfaces import Backbone as Backbone
    from ficpd.interfaces import Mechanism as Mechanism
    from ficpd.interfaces import Task as Task
    from ficpd.library.library import PromptLibrary as PromptLibrary
    from ficpd.library.session import load_library as load_library

__version__ = "0.1.0"
__all__ = ["Backbone", "Experiment", "Mechanism", "Method", "PromptLibrary", "Task", "compare", "load_library", "run"]
_MODULES = {
    "run": "experiments.api",
    "compare": "experiments.api",
    "load_library": "library.session",
    "PromptLibrary": "library.library",
    "Experiment": "experiments.config",
    "Method": "federation.method",
    **dict.fromkeys(("Backbone", "Mechanism", "Task"), "interfaces"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'ficpd' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"ficpd.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
