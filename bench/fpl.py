"""Personal prompts against one for all: FPL on label skew, on languages, on handwriting.

python bench/fpl.py abstracts|languages|digits|ablation [--seeds 0 1 2] [--data FOLDER] [--e5 FOLDER] [--dino FOLDER]

Twenty clients take part and four do not. `abstracts`: medical abstracts, labels by Dirichlet 0.3, MiniLM. `languages`:
SIB-200, a client of 100 records for each of 24 languages on multilingual E5; cards state family and script. `digits`:
MNIST, two groups of writers, labels by Dirichlet 0.3 within each, DINOv2-small at 56 pixels with a tuned head. `ablation`:
clusters, contrast and residual, each on and off, and label priors, on abstracts with and without ε = 2 (of which label
counts have a twentieth).

Figures in percent, of the clients' own test records ("own"), of other clusters' ("others"), and of those who took no part
("unseen"). Beside them: the share of clients that are worse off than alone, and the mean of the worst tenth.
"""

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import tomli_w

from ficpd.experiments.build import ExperimentContext, build_context
from ficpd.experiments.results import RunResult
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import no_progress, run_method
from ficpd.registry import validated_section
from library import RATE, faster, group
from measure import Cells, parse
from unseen import E5_RATE

CLIENTS, UNSEEN = 24, 4
FAMILIES = {
    "Germanic": "deu eng nld", "Romance": "fra ita por spa", "Slavic": "bul pol rus ukr", "Indo-Aryan": "hin urd",
    "Uralic": "fin", "Hellenic": "ell", "Semitic": "arb", "Japonic": "jpn", "Koreanic": "kor", "Sinitic": "zho",
    "Turkic": "tur", "Bantu": "swh", "Kra-Dai": "tha", "Austroasiatic": "vie", "Malayic": "ind",
}  # fmt: skip
FPL: dict[str, dict[str, Any]] = {
    "abstracts": {"name": "fpl", "clusters": "none", "label_prior": True},
    "languages": {"name": "fpl", "by": ["family", "script"], "num_clusters": 6},
    "digits": {"name": "fpl", "clusters": "given", "by": ["writer_group"], "label_prior": True},
}
BARE: dict[str, Any] = {"name": "fpl", "clusters": "none", "residual": "none"}
"""What the ablation adds to."""
PRIVATE: dict[str, Any] = {
    "privacy": {
        "name": "record_gaussian",
        "epsilon": 2.0,
        "delta": 1e-5,
        "statistics": {"labels": 0.05},
    },
    "compression": {"name": "subspace", "dimension": 64},
}
CONTRAST = {"weight": 0.1, "space": "both", "temperature": 0.1}
PUBLIC = 5
ALONE = "alone, "


def world_of(args: argparse.Namespace, seed: int, name: str, folder: Path, more: dict[str, Any]) -> ExperimentContext:
    tree: dict[str, Any] = more | {
        "seed": seed,
        "prompt": {"num_tokens": 10, "init": "vocabulary"},
        "training": {"local_steps": 5, "batch_size": 16},
        "federation": {"num_rounds": args.rounds, "unseen_clients": UNSEEN},
    }
    return {"abstracts": abstracts, "languages": languages, "digits": digits}[name](args, tree, folder)


def abstracts(args: argparse.Namespace, tree: dict[str, Any], folder: Path) -> ExperimentContext:
    parts = group("abstracts", args.data, CLIENTS, 100)
    parts["data"].pop("max_records")
    parts["partition"] = {"kind": "dirichlet", "concentration": 0.3, "num_clients": CLIENTS, "min_records": 16}
    tree |= parts | {"backbone": {"name": "minilm", "options": {"max_tokens": 48}}}
    tree["prompt"]["enters_at"] = 4
    return faster(build_context(parse(tomli_w.dumps(tree))), RATE)


def languages(args: argparse.Namespace, tree: dict[str, Any], folder: Path) -> ExperimentContext:
    table = pd.read_parquet(Path(args.data) / "sib200.parquet")
    family = {code: name for name, codes in FAMILIES.items() for code in codes.split()}
    langs = sorted(table.lang.unique())
    cards = {"client": langs, "family": [family[lang[:3]] for lang in langs], "script": [lang[4:] for lang in langs]}
    pd.DataFrame(cards).to_csv(folder / "cards.csv", index=False)
    parts = group("sib", args.data, CLIENTS, 100)
    parts["data"] |= {"where": {}, "columns": {"text": "text", "target": "label_name", "lang": "lang"}}
    parts["partition"] = {"kind": "column", "column": "lang", "cards": str(folder / "cards.csv")}
    options = {"max_tokens": 64, "prefix": "query: "}
    tree |= parts | {"backbone": {"name": str(args.e5), "kind": "sentence_encoder", "options": options}}
    tree["prompt"]["enters_at"] = 6
    return faster(build_context(parse(tomli_w.dumps(tree))), E5_RATE)


def digits(args: argparse.Namespace, tree: dict[str, Any], folder: Path) -> ExperimentContext:
    """5 images of each digit are public and nobody's: the head starts from their classes' means."""
    table = pd.read_parquet(Path(args.data) / "mnist_t10k.parquet")
    train = table[table.split == "train"]
    public = train.groupby("label").sample(PUBLIC, random_state=0)
    public.to_parquet(folder / "public.parquet")
    table.drop(public.index).to_parquet(folder / "digits.parquet")
    tree |= {
        "backbone": {"name": str(args.dino), "options": {"image_size": 56}},
        "task": {"name": "classification", "labels": {str(i): str(i) for i in range(10)}, "tuned_head": True},
        "data": {
            "source": str(folder / "digits.parquet"),
            "columns": {"image": "image", "target": "label", "writer_group": "writer_group"},
            "split_column": "split",
            "max_records": 2500,
        },
        "partition": {
            "kind": "column_dirichlet", "column": "writer_group", "concentration": 0.3, "num_clients": CLIENTS,
            "min_records": 16,
        },
    }  # fmt: skip
    tree["prompt"] |= {"enters_at": 6, "head_examples": str(folder / "public.parquet")}
    return build_context(parse(tomli_w.dumps(tree)))


def trial(context: ExperimentContext, method: dict[str, Any], folder: Path) -> RunResult:
    """One method's whole result."""
    experiment = context.experiment.model_copy(update={"method": validated_section("methods", method, "bench")})
    return run_method(replace(context, experiment=experiment), experiment.method, RunDir(folder), None, no_progress)


def figures(result: RunResult, local: dict[str, float]) -> dict[str, float]:
    """`local`: accuracy of each client alone."""
    own = {name: round(100 * score["accuracy"], 4) for name, score in result.scores.per_client.items()}
    worst = sorted(own.values())[: -(-len(own) // 10)]
    found = {"own": sum(own.values()) / len(own), "worst decile": sum(worst) / len(worst)}
    if local:
        found["worse than local"] = 100 * sum(own[name] < local[name] for name in own) / len(own)
    for level, scores in (result.personalization or {}).items():
        both = {"own": scores.own, "others": scores.others}
        found |= {f"{level}, {where}": 100 * score["accuracy"] for where, score in both.items() if score}
    if unseen := result.unseen_clients:
        both = {"global": unseen.global_prompt, "assigned": unseen.assigned}
        found |= {f"{level}, unseen": 100 * score["accuracy"] for level, score in both.items() if score}
    found |= {"bytes up": result.bytes.up_per_client_round, "seconds": result.seconds.total}
    if result.clusters:
        found["clusters"] = result.clusters.number
    return found | ({ALONE + name: value for name, value in own.items()} if result.method == "local" else {})


def compared(cells: Cells, args: argparse.Namespace, seed: int, name: str, methods: dict[str, dict[str, Any]],
             more: dict[str, Any]) -> None:  # fmt: skip
    """The methods on one world of this seed, those alone first: the others are compared with them."""
    if all(cells.has(label, seed) for label in methods):
        return
    with tempfile.TemporaryDirectory() as folder:
        context = world_of(args, seed, name, Path(folder), more)

        def run(method: dict[str, Any], place: int) -> dict[str, float]:
            known = cells.runs.get("local", {}).get(str(seed), {})
            alone = {key.removeprefix(ALONE): value for key, value in known.items() if key.startswith(ALONE)}
            return figures(trial(context, method, Path(folder) / str(place)), alone)

        for place, (label, method) in enumerate(methods.items()):
            cells.add(label, seed, partial(run, method, place))


def rows(args: argparse.Namespace, name: str) -> None:
    cells = Cells(f"fpl_{name}", f"{CLIENTS - UNSEEN} clients, {UNSEEN} unseen, {args.rounds} rounds of 5 steps of 16")
    methods = {"zero-shot": {"name": "zero_shot"}, "local": {"name": "local"}, "fedavg": {"name": "fedavg"}}
    for seed in args.seeds:
        compared(cells, args, seed, name, methods | {"fpl": FPL[name]}, {})


def ablation(args: argparse.Namespace) -> None:
    """Clusters, contrast and residual on and off; without privacy, then at ε = 2 in 64 numbers."""
    for label, more in (("none", {}), ("epsilon 2", PRIVATE)):
        cells = Cells(f"fpl_ablation {label}".replace(" ", "_"), f"abstracts, {args.rounds} rounds of 5 steps of 16")
        methods: dict[str, dict[str, Any]] = {"local": {"name": "local"}}
        for clusters, contrast, residual in product((True, False), repeat=3):
            method = BARE | ({"clusters": "signatures", "num_clusters": "auto"} if clusters else {})
            method |= {"contrast": CONTRAST} if contrast else {}
            method |= {"residual": "full"} if residual else {}
            on = {"clusters": clusters, "contrast": contrast, "residual": residual}
            if residual or not contrast:  # a contrast is of the residual
                methods[", ".join(key for key, value in on.items() if value) or "nothing"] = method
        methods |= {"label prior": BARE | {"label_prior": True}}
        methods |= {"label prior, residual": BARE | {"label_prior": True, "residual": "full"}}
        for seed in args.seeds:
            compared(cells, args, seed, "abstracts", methods, more)


PARTS = {name: partial(rows, name=name) for name in FPL} | {"ablation": ablation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default="data", help="folder of the sets")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--e5", type=Path, help="languages: folder of multilingual-e5-small")
    parser.add_argument("--dino", type=Path, help="digits: folder of dinov2-small")
    args = parser.parse_args()
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
