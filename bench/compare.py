"""Methods against one another, by `ficpd compare`: the files it is given, and what came out.

python bench/compare.py gradients|joining|private|blackbox|blackbox_skewed|mixed|languages|words|words_skewed
                        [--seeds 0 1 2] [--data FOLDER] [--e5 FOLDER] [--out FOLDER] [--jobs N]

`gradients`: polarity, medical abstracts and CLINC's domains, 10 clients of 80 records, alike and with labels by
Dirichlet 0.3. `joining`: the same clients with defaults alone, beside methods without prompts. `private`: ε = 1, 2, 4
per record and none, 6 clients of 300 records of polarity, in 64 numbers. `blackbox`: what losses alone are worth, by
queries and bytes. `blackbox_skewed`: the same with labels by Dirichlet 0.3, by clients' own tests. `mixed`: five
tasks in one federation. `languages`: SIB-200 in 8 languages on multilingual E5. `words`: SmolLM2, where prompts may
be words, or examples; `words_skewed`: with labels by Dirichlet 0.3. A run directory for each cell is left in `--out`;
`results/compare_PART.json` is `ficpd compare`'s own, and what it holds is not run again.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w

from ficpd.experiments.build import build_context
from ficpd.experiments.config import apply_override
from library import CLIENTS, PROTOTYPES, RATE, group
from measure import CHANGES, RESULTS, parse

TASKS = ("polarity", "abstracts", "clinc")
IID = {"partition": {"kind": "iid", "num_clients": 10}}
SKEWED = {"partition": {"kind": "dirichlet", "num_clients": 10, "concentration": 0.3, "min_records": 16}}
WAY = PROTOTYPES | {"space": "offset", "redraw_every": 1, "shrinkage": 0.5}
SUBSPACE = {"name": "subspace", "dimension": 64}
FARTHER = {"kind": "extrapolated"}
EPSILONS = (1, 2, 4)
NAMED: dict[str, dict[str, Any]] = {
    "ficpd": {"method": WAY},
    "ficpd, number found": {"method": {**WAY, "num_prototypes": "auto"}},
    "ficpd, label prior": {"method": {**WAY, "label_prior": True}},
    "ficpd, label prior, extrapolated": {"method": {**WAY, "label_prior": True, "server": FARTHER}},
    "fpl, label prior": {"method": {"name": "fpl", "clusters": "none", "label_prior": True}},
    "fpl": {"method": {"name": "fpl", "clusters": "none"}},
    "fedavg, label prior": {"method": {"name": "fpl", "clusters": "none", "residual": "none", "label_prior": True}},
    "fedavg, label prior, extrapolated": {
        "method": {"name": "fpl", "clusters": "none", "residual": "none", "label_prior": True, "server": FARTHER}
    },
    "dp_fpl": {"method": {"name": "dp_fpl"}, "compression": {"name": "none"}},
    "fedlora": {"method": {"name": "fedlora"}, "compression": {"name": "none"}},
    "feddtpt": {"method": {"name": "feddtpt"}, "compression": {"name": "none"}},
    "ficpd, black box": {"method": WAY, "training": {"optimizer": "spsa"}},
    "ficpd, black box, label prior": {
        "method": {**WAY, "label_prior": True},
        "training": {"optimizer": "spsa"},
    },
    "fedbpt": {"method": {"name": "fedbpt", "iterations": 4}},
    "fedbpt, plain loss": {"method": {"name": "fedbpt", "iterations": 4, "ratio": False, "spread": 0.3}},
}
"""Methods of other settings than their defaults, by label."""


def methods(*labels: str) -> dict[str, Any]:
    return {label: NAMED.get(label, {}) for label in labels}


def base(args: argparse.Namespace, backbone: dict[str, Any], enters_at: int, rounds: int) -> dict[str, Any]:
    """What all tasks of a part have in common, at `RATE` times the backbone's own learning rate. That is found in float32:
    one that each machine found in its own dtype would make other runs of the same seed."""
    tree = {
        "name": "compare",
        "backbone": backbone,
        "prompt": {"num_tokens": 10, "enters_at": enters_at, "init": "vocabulary"},
        "training": {"local_steps": 5, "batch_size": 16},
        "federation": {"num_rounds": rounds},
        **group("polarity", args.data, 10, 100),
    }
    exact = tree | {"backbone": backbone | {"dtype": "float32", "attention": "eager"}}
    known = build_context(parse(tomli_w.dumps(exact))).experiment.training.learning_rate
    tree["training"] |= {"learning_rate": RATE * (known or 0.0)}
    return tree


def gradients(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "recipe": base(args, {"name": "minilm", "options": {"max_tokens": 48}}, 4, 8),
        "methods": methods(
            "ficpd",
            "ficpd, number found",
            "ficpd, label prior",
            "ficpd, label prior, extrapolated",
            "fpl, label prior",
            "fedavg",
            "fedavg, label prior",
            "fedavg, label prior, extrapolated",
            "fedprox",
            "fedhpl",
        ),
        "tasks": {name: group(name, args.data, 10, 80) for name in TASKS},
        "partitions": {"alike": IID, "labels by Dirichlet 0.3": SKEWED},
    }


def joining(args: argparse.Namespace) -> dict[str, Any]:
    """What a client gains by joining: methods' defaults alone, at the backbone's own learning rate."""
    recipe = base(args, {"name": "minilm", "options": {"max_tokens": 48}}, 4, 8)
    recipe["training"].pop("learning_rate")
    return {
        "recipe": recipe,
        "methods": {"ficpd": {}, **methods("linear_probe", "analytic", "class_means", "fedavg")},
        "tasks": {name: group(name, args.data, 10, 80) for name in TASKS},
        "partitions": {"alike": IID, "labels by Dirichlet 0.3": SKEWED},
    }


def private(args: argparse.Namespace) -> dict[str, Any]:
    recipe = base(args, {"name": "minilm", "options": {"max_tokens": 48}}, 4, 8)
    recipe["training"] = {"local_steps": 2, "batch_size": 64}
    recipe["compression"] = SUBSPACE
    return {
        "recipe": recipe,
        "methods": methods(
            "ficpd",
            "fpl",
            "fedavg",
            "fedprox",
            "fedhpl",
            "dp_fpl",
            "prompt_dpsgd",
            "dp_zo",
            "dp_cma_es",
            "feddtpt",
            "fedlora",
        ),
        "tasks": {"polarity": group("polarity", args.data, 6, 300)},
        "partitions": {"alike": {"partition": IID["partition"] | {"num_clients": 6}}},
        "evaluate_every": 8,
        "budgets": {f"ε = {e}": {"epsilon": float(e)} for e in EPSILONS} | {"no privacy": {"epsilon": float("inf")}},
    }


def blackbox(args: argparse.Namespace) -> dict[str, Any]:
    recipe = base(args, {"name": "minilm", "options": {"max_tokens": 48}}, 4, 10)
    recipe["compression"] = SUBSPACE
    recipe["training"]["learning_rate"] /= RATE  # at thrice the rate, zeroth-order steps overshoot after two rounds
    return {
        "recipe": recipe,
        "methods": methods("dp_zo", "dp_cma_es", "ficpd, black box", "fedbpt", "fedbpt, plain loss", "fedavg"),
        "reference": "fedbpt",
        "figure": "everyone",
        "evaluate_every": 2,
        "tasks": {"polarity": group("polarity", args.data, 10, 60)},
        "partitions": {"alike": IID},
    }


def blackbox_skewed(args: argparse.Namespace) -> dict[str, Any]:
    rivals = "dp_zo", "ficpd, black box", "ficpd, black box, label prior", "fedbpt", "fedbpt, plain loss"
    return blackbox(args) | {
        "methods": methods(*rivals),
        "reference": "fedbpt, plain loss",
        "figure": "own",
        "partitions": {"labels by Dirichlet 0.3": SKEWED},
    }


def mixed(args: argparse.Namespace) -> dict[str, Any]:
    recipe = base(args, {"name": "minilm", "options": {"max_tokens": 48}}, 4, 10)
    for part in ("task", "data", "partition"):
        recipe.pop(part)
    recipe["groups"] = {name: group(name, args.data, number, 100) for name, number in CLIENTS.items()}
    ours = {"ficpd": {"method": PROTOTYPES}, "ficpd, extrapolated": {"method": PROTOTYPES | {"server": FARTHER}}}
    return {"recipe": recipe, "methods": ours | methods("fedavg", "fedhpl")}


def languages(args: argparse.Namespace) -> dict[str, Any]:
    options = {"max_tokens": 64, "prefix": "query: "}
    recipe = base(args, {"name": str(args.e5), "kind": "sentence_encoder", "options": options}, 6, 6)
    parts = group("sib", args.data, 8, 60)
    eight = ["eng_Latn", "deu_Latn", "spa_Latn", "rus_Cyrl", "arb_Arab", "hin_Deva", "zho_Hans", "swh_Latn"]
    parts["data"] |= {"where": {"lang": eight}, "columns": {"text": "text", "target": "label_name", "lang": "lang"}}
    parts["partition"] = {"kind": "column", "column": "lang"}
    return {"recipe": recipe | parts, "methods": methods("ficpd", "fedavg", "fedhpl")}


def words(args: argparse.Namespace) -> dict[str, Any]:
    recipe = base(args, {"name": "smollm2", "options": {"max_tokens": 64}}, 0, 4)
    return {
        "recipe": recipe | group("polarity", args.data, 4, 40),
        "methods": methods("ficpd", "ficpd, number found", "fedavg", "feddtpt", "icl", "fedhpl"),
        "partitions": {"alike": {"partition": {"kind": "iid", "num_clients": 4}}},
    }


def words_skewed(args: argparse.Namespace) -> dict[str, Any]:
    skewed = {"partition": SKEWED["partition"] | {"num_clients": 4}}
    return words(args) | {
        "methods": methods("ficpd", "ficpd, label prior", "feddtpt", "fedhpl"),
        "partitions": {"labels by Dirichlet 0.3": skewed},
    }


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    build.__name__: build
    for build in (gradients, joining, private, blackbox, blackbox_skewed, mixed, languages, words, words_skewed)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default="data", help="folder of the sets")
    parser.add_argument("--e5", type=Path, help="languages: folder of multilingual-e5-small")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--jobs", default="2")
    args = parser.parse_args()
    out = args.out / args.part
    out.mkdir(parents=True, exist_ok=True)
    tree = PARTS[args.part](args)
    for change in CHANGES:
        apply_override(tree["recipe"], change)
    recipe = out.with_suffix(".recipe.toml")
    recipe.write_text(tomli_w.dumps(tree["recipe"]), encoding="utf-8")
    asked = {"name": args.part, "recipe": recipe.name, "seeds": args.seeds, "reference": "ficpd"} | {
        key: value for key, value in tree.items() if key != "recipe"
    }
    file = out.with_suffix(".toml")
    file.write_text(tomli_w.dumps(asked), encoding="utf-8")
    command = [sys.executable, "-m", "ficpd", "compare", str(file), "--out", str(out), "--jobs", args.jobs]
    status = subprocess.run(command, check=False).returncode
    if (out / "compare.json").exists():
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copy(out / "compare.json", RESULTS / f"compare_{args.part}.json")
    raise SystemExit(status)


if __name__ == "__main__":
    main()
