"""Makes the sections on prototypes, the prompt library and synthetic examples."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ficpd.evaluation.metrics import main_metric
from ficpd.experiments.finished import FinishedRun
from ficpd.experiments.report import figures
from ficpd.experiments.report.blocks import Block, Examples, Figure, Section, Table, Text
from ficpd.experiments.report.summary import format_score
from ficpd.experiments.results import Distillation
from ficpd.library.card import describe_shape
from ficpd.library.distillation import filters
from ficpd.library.library import PromptLibrary

OFFSET, SYNTHETIC = "offset/", "synthetic.jsonl"
MOST_EXAMPLES = 40
"""The maximum number of shown examples of each label."""
LEAST_FIT = 0.1
"""The adjusted Rand index below which clusters do not match the clients' known facts."""


# ---------------------------------------------------------------- prototypes


def prototypes(run: FinishedRun) -> Section | None:
    clusters, library = run.result.clusters, run.library
    if not clusters or library is None:
        return None
    members: dict[int, list[str]] = {}
    for name, cluster in sorted(clusters.member.items()):
        members.setdefault(cluster, []).append(name)
    cells = [[f"prototype-{k}", str(len(of)), ", ".join(of)] for k, of in sorted(members.items())]
    blocks: list[Block] = [*_plane(run, library, clusters.member)]
    blocks.append(Table("Who shares which prototype", ["prototype", "number", "clients"], cells))
    fit = max((value for value in clusters.adjusted_rand.values() if value is not None), default=0.0)
    folded = "there is one prototype" if len(members) < 2 else "they match no known fact" if fit < LEAST_FIT else ""
    fits = [f"{key} {value:.2f}" for key, value in clusters.adjusted_rand.items() if value is not None]
    if fits:
        blocks.append(
            Text(f"Agreement with the clients' known facts (adjusted Rand index; 1: the same): {', '.join(fits)}.")
        )
    return Section("prototypes", "Prototypes and their clients", blocks, folded)


def _plane(run: FinishedRun, library: PromptLibrary, member: Mapping[str, int]) -> list[Figure]:
    """Draws the offsets of the prompts from the start, and those of clients if the server has them."""
    ways = {name: library.offset(name) for name in library.prompts}
    if len(ways) < 2:
        return []
    arrays, shared = run.state.arrays if run.state else {}, ways.get("global")
    # methods/ficpd keeps each client's offset from the global prompt
    clients = {
        name: shared + arrays[OFFSET + name]
        for name in member
        if shared is not None and OFFSET + name in arrays and arrays[OFFSET + name].shape == shared.shape
    }
    at, kept = flattened([*ways.values(), *clients.values()])
    of_clients = dict(zip(clients, at[len(ways) :], strict=True))
    said = (
        f"Principal components of the prompts' offsets from the start; together they have {sum(kept):.0%} of the variance."
        + (" A client's dot is its prompt at the end of its last round." if clients else "")
    )
    axes = f"first component ({kept[0]:.0%})", f"second ({kept[1]:.0%})"
    of_prompts = dict(zip(ways, at, strict=False))
    return [figures.plane("plane", "Prompts in two dimensions", said, of_clients, member, of_prompts, axes)]


def flattened(ways: Sequence[Tensor]) -> tuple[list[tuple[float, float]], list[float]]:
    """Projects prompts [P, D] to the plane of largest variance. Returns points, and each axis's share of variance."""
    from sklearn.decomposition import PCA

    stacked = torch.stack([way.flatten().double() for way in ways]).numpy()
    if not (stacked - stacked.mean(0)).any():
        return [(0.0, 0.0)] * len(ways), [0.0, 0.0]
    pca = PCA(2, svd_solver="full").fit(stacked)
    at = [(float(x), float(y)) for x, y in pca.transform(stacked)]
    return at, [float(share) for share in pca.explained_variance_ratio_]


# ---------------------------------------------------------------- the library


def library(run: FinishedRun) -> Section | None:
    found = run.library
    if found is None or not found.prompts:
        return None
    # token ids have no norm
    lengths = {
        name: f"{way.norm():.3f}" if (way := found.offset(name)).is_floating_point() else "–" for name in found.prompts
    }
    cells = [[name, length, most_similar(found, name)] for name, length in lengths.items()]
    of_tasks = found.card["tasks"].items()
    tasks = ", ".join(name if name == about["name"] else f"{name} ({about['name']})" for name, about in of_tasks)
    heads = ["prompt", "distance from the start", "most similar (cosine)"]
    return Section("library", "The prompt library", [
        Text(f"Made for: {tasks}. Each prompt is {describe_shape(found.start)}."),
        Table("Prompts and their distance from the start", heads, cells),
    ])  # fmt: skip


def most_similar(library: PromptLibrary, name: str) -> str:
    """Names the prompt whose offset has the largest cosine with this prompt's offset."""
    others = [other for other in library.prompts if other != name]
    if not others or not library.offset(name).any():
        return "–"
    cosine = {
        o: float(F.cosine_similarity(library.offset(o).flatten(), library.offset(name).flatten(), 0)) for o in others
    }
    best = max(others, key=lambda other: cosine[other])
    return f"{best} ({cosine[best]:.2f})"


# ---------------------------------------------------------------- synthetic examples


def examples(run: FinishedRun) -> Section | None:
    """Shows a few synthetic examples of each label."""
    file, facts = run.directory / SYNTHETIC, run.result.distillation
    lines = filters.load(file) if file.exists() else []
    if not lines and not facts:
        return None
    blocks: list[Block] = [Text(_distilled(run, facts))] if facts else []
    for label in sorted({str(example.label) for example in lines}):
        own = [example for example in lines if str(example.label) == label]
        texts = [(e.text, f"{e.prototype}, agreement {e.agreement:.2f}") for e in own[:MOST_EXAMPLES]]
        blocks.append(Examples(f"{label}, {len(texts)} of {len(own)} shown", texts))
    return Section("examples", "Synthetic examples", blocks)


def _distilled(run: FinishedRun, facts: Distillation) -> str:
    made = "; ".join(f"{group}: {said}" for group, said in facts.examples.items())
    said = f"Written by {facts.writer}. {made[:1].upper()}{made[1:]}."
    scores = run.result.metrics
    if scores is None or not scores.distilled:
        return said
    main, outcome = (
        main_metric(scores.distilled),
        "kept" if facts.gained else "not kept, because it is no better on held-out examples",
    )
    both = [format_score(score, main) for score in (scores.distilled, scores.global_prompt)]
    return (
        f"{said} One prompt was distilled from the prototypes on them ({facts.how}) and {outcome}: everyone's test "
        f"{main.name}{main.unit} {both[0]}, the global prompt {both[1]}."
    )
