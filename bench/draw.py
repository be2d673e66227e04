"""Pictures of what the benches found, as SVG in docs/img.

python bench/draw.py ablation                     from results/library_ablation.json
python bench/draw.py joining                      from results/compare_joining.json: alone, and together
python bench/draw.py signatures [--data FOLDER]   who is alike after one round, seen in each space (one run a space)
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
from sklearn.decomposition import PCA
from torch.nn import functional as F

from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import no_progress, run_method
from ficpd.methods.ficpd import SIGNATURE
from ficpd.registry import validated_section
from library import PROTOTYPES, world_of
from measure import RESULTS
from tables import FIRST, SKEW

PICTURES = RESULTS.parent.parent / "docs" / "img"
SPACES = {"delta": "what each learned first", "prompt": "the prompt it reached", "function": "what that does to probes"}
NUMBERS = (1, 2, 5, 10, 20)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
"""Okabe and Ito: told apart by the colour-blind too."""


def ablation(args: argparse.Namespace) -> None:
    """Accuracy by number of prototypes, one line a space; dashed: the one prompt distilled from them."""
    cells = json.loads((RESULTS / "library_ablation.json").read_text())["cells"]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for colour, space in zip(COLOURS, SPACES, strict=False):
        rows = [cells[f"{k} prototypes, {space if k > 1 else 'delta'}"] for k in NUMBERS]
        for figures, line in (("mean client", "-o"), ("distilled", "--s")):
            means, spreads = ([row[figures][of] for row in rows] for of in ("mean", "sd"))
            said = f"{space}, {'each its prototype' if figures == 'mean client' else 'one distilled prompt'}"
            axes.errorbar(
                range(len(NUMBERS)), means, spreads, fmt=line, color=colour, capsize=3, label=said, markersize=4
            )
    axes.set_xticks(range(len(NUMBERS)), [str(k) for k in NUMBERS])
    axes.set_xlabel("prototypes at most")
    axes.set_ylabel("accuracy in percent\n(prototypes: mean client; distilled: mean task)")
    axes.legend(fontsize=7, handlelength=4, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _saved(figure, "ablation")


def joining(args: argparse.Namespace) -> None:
    """Each situation's mean client alone, at the better of a prompt and a probe, and in a federation."""
    found = json.loads((RESULTS / "compare_joining.json").read_text())
    clients = found["partitions"]["alike"]["num_clients"]
    figure, axes = plt.subplots(figsize=(7, 3.1), layout="constrained")
    for place, (heading, task) in enumerate(FIRST.items()):
        wanted = {"task": task, "partition": SKEW if "skewed" in heading else "alike"}
        (one,) = [one["methods"] for one in found["conditions"] if wanted.items() <= one.items()]
        alone, together = (
            100 * max(one[name]["mean"] for name in of) for of in (("local", "linear_probe"), ("ficpd",))
        )
        axes.plot([alone, together], [-place, -place], color="#999999", linewidth=3, zorder=1)
        axes.scatter([alone], [-place], color="#d55e00", s=45, label="alone" if not place else None)
        axes.scatter([together], [-place], color="#0072b2", s=45, label="together, with FICPD" if not place else None)
        gain = round(together, 1) - round(alone, 1)  # as the table shows them
        axes.annotate(f"{gain:+.1f}", (together, -place), (7, -3), textcoords="offset points", fontsize=9)
    sent = found["conditions"][0]["methods"]["ficpd"]["bytes_up"] / clients
    axes.set_yticks([-place for place in range(len(FIRST))], FIRST)
    axes.set_xlabel(
        f"accuracy of the mean client on its own test records, in percent\n{clients} clients of about 80 records, no "
        f"privacy, five seeds; each sends {sent / 1e6:.1f} MB in all"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False, loc="lower left")
    axes.margins(x=0.08)
    _saved(figure, "joining")


def signatures(args: argparse.Namespace) -> None:
    """Thirty clients of five tasks, in the first two principal components of the unit signatures."""
    context, places = world_of(args, args.seed), {}
    for space in SPACES:
        method = validated_section("methods", PROTOTYPES | {"space": space}, "bench")
        federation = context.experiment.federation.model_copy(update={"num_rounds": 1})
        experiment = context.experiment.model_copy(update={"method": method, "federation": federation})
        with tempfile.TemporaryDirectory() as folder:
            directory = RunDir(Path(folder) / "run")
            result = run_method(replace(context, experiment=experiment), method, directory, None, no_progress)
            state = directory.load()[0]  # type: ignore[index]
        assert result.clusters is not None
        names = [name for name in state.arrays if name.startswith(SIGNATURE)]
        unit = F.normalize(torch.stack([state.arrays[name].flatten() for name in names]), dim=1).numpy()
        groups = [name.removeprefix(SIGNATURE).partition(".")[0] for name in names]
        places[space] = PCA(2).fit_transform(unit), groups, result.clusters.adjusted_rand["group"]
    figure, axes = plt.subplots(1, len(SPACES), figsize=(9, 3.2), layout="constrained")
    for drawn, (space, (at, groups, index)) in zip(axes, places.items(), strict=True):
        for colour, group in zip(COLOURS, context.tasks, strict=True):
            mine = np.array([g == group for g in groups])
            drawn.scatter(*at[mine].T, color=colour, s=18, label=group)
        drawn.set_title(f"{space}: {SPACES[space]}\nadjusted Rand index {index:.2f}", fontsize=9)
        drawn.set_xticks([])
        drawn.set_yticks([])
    axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _saved(figure, "signatures")


def _saved(figure: Figure, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
    figure.savefig(Path(tempfile.gettempdir()) / f"{name}.png", dpi=110)
    print(f"saved docs/img/{name}.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=("ablation", "joining", "signatures"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default="data", help="folder of the sets")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    plt.rcParams["svg.hashsalt"] = "ficpd"
    {"ablation": ablation, "joining": joining, "signatures": signatures}[args.picture](args)


if __name__ == "__main__":
    main()
