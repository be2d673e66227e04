"""Runs an experiment over Flower: among real sites, or in Flower's simulation."""

from pathlib import Path

from ficpd.deployment import flower_simulation
from ficpd.deployment.flower_cli import reachable, submit
from ficpd.deployment.flower_engine import Config
from ficpd.experiments.config import Experiment, to_toml
from ficpd.registry import checked


def over_flower(experiment: Experiment, recipe: str | None, out: Path, resume: bool) -> int:
    """What `ficpd run --engine flower` does: with `engine.options.superlink` among real sites, else a simulation. `recipe`:
    the file that the experiment was read from unchanged, so that a site can name its lines."""
    config = checked(Config, experiment.engine.options, "engine.options")
    if config.superlink is None:
        flower_simulation.run(experiment, out, resume)
        return 0
    text, name = to_toml(experiment), f"{experiment.name}.toml"
    if recipe and Path(recipe).is_file():
        text, name = Path(recipe).read_text(encoding="utf-8"), Path(recipe).name
    reachable(config.superlink)
    return submit(text, name, out, resume, [config.superlink])
