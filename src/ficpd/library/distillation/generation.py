"""Generates synthetic examples on the server: texts, labelled by the prototypes.

A writer (a causal backbone) generates texts for every public label. Without a writer, public texts or random words are
used. The prototypes then vote: a text is kept if enough of them agree, and if they agree with its intended label. No
client's record is read, so this is post-processing (docs/privacy.md).

Zero-shot data generation: Ye et al., EMNLP 2022, arXiv 2202.07922. Labels from votes on public texts: Papernot et
al., ICLR 2017, arXiv 1610.05755.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from ficpd import rng
from ficpd.errors import BackboneError, ConfigError, DataError
from ficpd.interfaces import Backbone, Model, Task
from ficpd.library.distillation.filters import FilterResult, SyntheticExample, distinct, grams_of, records, words_of
from ficpd.types import Answer, Prompt, Query

WRITER, PUBLIC, NONSENSE = "writer", "public text", "nonsense"
"""The source of an example without a prototype."""
SHORTEST, MOST_SIGNS, MOST_REPEATED = 3, 0.4, 0.5
"""A text needs three words, at most 40 % non-letters, and at most half of its trigrams from the request."""
OF_ITSELF = re.compile(
    r"\b(i['’]m sorry,? (but|for any)|as an ai|i['’]m an ai|language model|not able to assist)\b", re.I
)
"""Matches an assistant's replies about itself, which small writers often give instead of a text."""
SHOWN = (
    ("This text is about the weather", "Dark clouds rolled in over the harbour, and by noon it was pouring."),
    ("The writer is tired", "I slept three hours last night and can hardly keep my eyes open."),
    ("The tone is polite", "Could you please let me know when the next train leaves?"),
)
"""Example requests with a text each: small writers follow examples better than instructions."""


class PromptTemplate(NamedTuple):
    """The template of a request: `shown` with {request} and {text} for each example, then `asked` with {request}."""

    shown: str
    asked: str


CHAT = PromptTemplate(
    "<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n",
    "<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n",
)
"""The ChatML template (SmolLM2, Qwen), for writers that were tuned on it."""


# ---------------------------------------------------------------- texts


def generate_texts(
    writer: Backbone, prompts: Mapping[str, Prompt], task: Task, per_label: int, seed: int, *, form: PromptTemplate = CHAT,
    temperature: float = 0.8, max_tokens: int = 40,
) -> FilterResult:  # fmt: skip
    """Generates `per_label` drafts of every label, cleans them and drops near duplicates.

    Prototypes tuned on the writer's backbone take turns. If there are none, the bare writer generates. Raises
    `BackboneError` if the backbone cannot generate, and `ConfigError` for a task without labels.
    """
    wishes = [wish for wish in label_requests(task).items() for _ in range(per_label)]
    drafts: list[SyntheticExample] = []
    reasons: Counter[str] = Counter()
    own = [(name, prompt) for name, prompt in sorted(prompts.items()) if prompt.backbone == writer.fingerprint]
    own = own or [(WRITER, Prompt(torch.zeros(0, writer.width), writer.fingerprint))]
    for turn, (name, prompt) in enumerate(own):
        mine = wishes[turn :: len(own)]
        openings = [few_shot_prefix(wish, form) for _, wish in mine]
        texts = _generated(writer, prompt, openings, max_tokens, temperature, rng.derive_seed(seed, "write", name))
        for (label, _), asked, text in zip(mine, openings, texts, strict=True):
            line, reason = clean_text(text, asked)
            reasons.update([reason] if reason else [])
            drafts += [SyntheticExample(line, label, name)] if reason is None else []
    return FilterResult(drafts, reasons).then(distinct)


def from_texts(texts: Iterable[str]) -> FilterResult:
    """Cleans public texts without labels and drops near duplicates, without a writer."""
    found = [clean_text(text, "") for text in texts]
    kept = [SyntheticExample(line, None, PUBLIC) for line, reason in found if reason is None]
    return FilterResult(kept, Counter(reason for _, reason in found if reason)).then(distinct)


def from_nonsense(backbone: Backbone, number: int, seed: int) -> FilterResult:
    """Returns texts of random vocabulary words, for runs without a writer and without texts."""
    texts = backbone.synthetic_inputs(number, rng.derive_seed(seed, "synthetic nonsense"))
    return FilterResult([SyntheticExample(text, None, NONSENSE) for text in texts], Counter())


def read_texts(path: Path) -> list[str]:
    """Reads a file of public texts, one a line. Raises `DataError` if it cannot be read or is empty."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}); give a UTF-8 file with one text a line") from error
    if not lines:
        raise DataError(f"{path} has no texts; expected one a line")
    return lines


def label_requests(task: Task) -> dict[str, str]:
    """Returns the request for each label: the task's instruction and the label's text.

    Raises `ConfigError` for a task without labels.
    """
    about = task.to_config()
    labels: Mapping[str, str] = about.get("labels") or {}
    if not has_labels(task):
        raise ConfigError(f"task {about.get('name')!r}: expected a classification; examples need a list of labels")
    return {label: f"{about.get('instruction', '')} {text}".strip() for label, text in labels.items()}


def has_labels(task: Task) -> bool:
    """Tells whether examples can be generated for a task."""
    return bool(task.to_config().get("labels"))


def few_shot_prefix(wish: str, form: PromptTemplate) -> str:
    """Returns the writer's input: three requests with a text each, then this request."""
    shown = "".join(form.shown.format(request=f"Write one sentence. {w}.", text=text) for w, text in SHOWN)
    return shown + form.asked.format(request=f"Write one sentence. {wish}.")


def clean_text(text: str, asked: str) -> tuple[str, str | None]:
    """Returns the first line with content, and the reason to drop it (None: keep).

    >>> clean_text('Sure, here is one:\\n"The match went to extra time', "")
    ('The match went to extra time', None)
    >>> clean_text("1) 4 + 4 = 8 = 9 - 1", "")[1]
    'no text'
    """
    lines = (re.sub(r"^([-*•]|\d+[.)])\s+", "", line.strip()).strip("\"'“”‘’` ") for line in text.splitlines())
    line = next((line for line in lines if line and not line.endswith(":")), "")
    if not line:
        return line, "blank"
    if sum(not (c.isalpha() or c.isspace()) for c in line) > MOST_SIGNS * len(line):
        return line, "no text"
    if len(words_of(line)) < SHORTEST:
        return line, "too short"
    if OF_ITSELF.search(line):
        return line, "speaks of itself"
    if len(grams_of(line) & grams_of(asked)) > MOST_REPEATED * len(grams_of(line)):
        return line, "repeats the request"
    return line, None


def _generated(writer, prompt, openings, max_tokens, temperature, seed) -> list[str]:
    try:
        return writer.generate(prompt, openings, max_tokens, temperature=temperature, seed=seed)
    except BackboneError as error:
        raise BackboneError(
            f"the writer cannot generate: {error}. Configure a causal_lm backbone, such as smollm2, or give a file of "
            "public texts, one a line"
        ) from error


# ---------------------------------------------------------------- labels


def vote_labels(
    model: Model,
    prompts: Mapping[str, Prompt],
    task: Task,
    examples: Sequence[SyntheticExample],
    least_agreement: float = 0.75,
) -> FilterResult:
    """Labels each text by the most frequent vote of the prompts, if its share is at least `least_agreement`.

    Drops a text with another intended label. Ties go to the label that the task lists first.
    """
    names = list(label_requests(task))
    if not examples or not prompts:
        return FilterResult([], Counter({"no prompt to vote": len(examples)} if examples else {}))
    ballots = zip(*_labels(model, prompts, task, examples), strict=True)
    kept: list[SyntheticExample] = []
    reasons: Counter[str] = Counter()
    for example, ballot in zip(examples, ballots, strict=True):
        label = max(names, key=ballot.count)
        agreement = ballot.count(label) / len(ballot)
        if agreement < least_agreement:
            reasons["prototypes disagree"] += 1
        elif example.label not in (None, label):
            reasons["voted for another label"] += 1
        else:
            kept.append(replace(example, label=label, agreement=agreement))
    return FilterResult(kept, reasons)


def labelled(
    model: Model, prompts: Mapping[str, Prompt], task: Task, examples: Sequence[SyntheticExample]
) -> dict[str, list[SyntheticExample]]:
    """Labels the texts by each prompt alone. These labels define a prototype's task."""
    found = zip(sorted(prompts), _labels(model, prompts, task, examples), strict=True)
    return {
        name: [replace(example, label=label, agreement=1.0) for example, label in zip(examples, labels, strict=True)]
        for name, labels in found
    }


def _labels(
    model: Model, prompts: Mapping[str, Prompt], task: Task, examples: Sequence[SyntheticExample]
) -> list[list]:
    """Returns each prompt's prediction of each text, by sorted prompt name."""
    ordered = [prompt for _, prompt in sorted(prompts.items())]
    batch = task.encode(records(examples, labelled=False), model.backbone, ordered[0])
    answer = model.answer([Query(torch.stack([p.vectors_PD for p in ordered]), batch, outputs=True)])[0]
    assert answer.outputs_KB is not None
    rows_KB = torch.arange(answer.loss_KB.numel()).view_as(answer.loss_KB)
    alone = [
        Answer(loss_B[None], None, answer.outputs_KB.select(rows_B))
        for loss_B, rows_B in zip(answer.loss_KB, rows_KB, strict=True)
    ]
    return [task.predict(of_one, batch) for of_one in alone]
