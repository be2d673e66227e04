"""A picture of what the benches found, as SVG in docs/img: alone, and together. From results/compare_joining.json.

python bench/draw.py
"""

import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

from measure import RESULTS
from tables import FIRST, SKEW

PICTURES = RESULTS.parent.parent / "docs" / "img"


def main() -> None:
    """Each situation's mean client alone, at the better of a prompt and a probe, and in a federation."""
    plt.rcParams["svg.hashsalt"] = "ficpd"
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
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / "joining.svg", metadata={"Date": None})
    figure.savefig(Path(tempfile.gettempdir()) / "joining.png", dpi=110)
    print("saved docs/img/joining.svg")


if __name__ == "__main__":
    main()
