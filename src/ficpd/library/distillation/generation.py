"""Synthetic examples: texts that the server writes by itself, and the prototypes label.

A writer (a causal backbone) is asked for a text of every public label; where there is none, public texts or made-up words
serve. The prototypes then vote: a text is kept where enough of them agree, and where they agree with the label it was
written for. No client's record is asked for anything, so all of it is post-processing (docs/privacy.md).

Zero-shot data generation: Ye et al., EMNLP 2022, arXiv 2202.07922. Labels from the sites' votes on public texts:
Papernot et al., ICLR 2017, arXiv 1610.05755.
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
"""Who wrote an example, where it was no prototype."""
SHORTEST, MOST_SIGNS, MOST_REPEATED = 3, 0.4, 0.5
"""A text has at least three words, at most two signs in five that are no letters, and less than half of its runs of three
words are the request's."""
OF_ITSELF = re.compile(
    r"\b(i['’]m sorry,? (but|for any)|as an ai|i['’]m an ai|language model|not able to assist)\b", re.I
)
"""A small assistant that was asked for a text often answers the asker instead."""
SHOWN = (
    ("This text is about the weather", "Dark clouds rolled in over the harbour, and by noon it was pouring."),
    ("The writer is tired", "I slept three hours last night and can hardly keep my eyes open."),
    ("The tone is polite", "Could you please let me know when the next train leaves?"),
)
"""Wishes with a text for each, made up for this file: a small writer does as it is shown, not as it is told."""


class PromptTemplate(NamedTuple):
    """How a writer is asked: `shown` with {request} and {text} for each demonstration, then `asked` with {request}."""

    shown: str
    asked: str


PLAIN = PromptTemplate("{request}\n{text}\n\n", "{request}\n")
CHAT = PromptTemplate(
    "<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n",
    "<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n",
)
"""The turns of ChatML (SmolLM2, Qwen): for writers that were tuned on them."""


# ---------------------------------------------------------------- texts


def generate_texts(
    writer: Backbone, prompts: Mapping[str, Prompt], task: Task, per_label: int, seed: int, *, form: PromptTemplate = CHAT,
    temperature: float = 0.8, max_tokens: int = 40,
) -> FilterResult:  # fmt: skip
    """`per_label` drafts of every label, cleaned and without near duplicates; their label is the one written for.

    Prototypes whose prompts are the writer's own take turns; else the bare writer writes. Raises `BackboneError` if the
    backbone cannot write, and `ConfigError` for a task without labels.
    """
    wishes = [wish for wish in label_requests(task).items() for _ in range(per_label)]
    drafts: list[SyntheticExample] = []
    reasons: Counter[str] = Counter()
    for turn, (name, prompt) in enumerate(own := _writers(writer, prompts)):
        mine = wishes[turn :: len(own)]
        openings = [few_shot_prefix(wish, form) for _, wish in mine]
        texts = _generated(writer, prompt, openings, max_tokens, temperature, rng.derive_seed(seed, "write", name))
        for (label, _), asked, text in zip(mine, openings, texts, strict=True):
            line, reason = clean_text(text, asked)
            reasons.update([reason] if reason else [])
            drafts += [SyntheticExample(line, label, name)] if reason is None else []
    return FilterResult(drafts, reasons).then(distinct)


def from_texts(texts: Iterable[str]) -> FilterResult:
    """Public texts without labels, cleaned and without near duplicates: no writer is needed."""
    found = [clean_text(text, "") for text in texts]
    kept = [SyntheticExample(line, None, PUBLIC) for line, reason in found if reason is None]
    return FilterResult(kept, Counter(reason for _, reason in found if reason)).then(distinct)


def from_nonsense(backbone: Backbone, number: int, seed: int) -> FilterResult:
    """Words drawn from the vocabulary, as a last resort: their outputs still tell two prompts apart."""
    texts = backbone.synthetic_inputs(number, rng.derive_seed(seed, "synthetic nonsense"))
    return FilterResult([SyntheticExample(text, None, NONSENSE) for text in texts], Counter())


def read_texts(path: Path) -> list[str]:
    """A file of public texts, one a line, empty lines left out. Raises `DataError` if it cannot be read or has none."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}); give a UTF-8 file with one text a line") from error
    if not lines:
        raise DataError(f"{path} holds no texts; expected one a line")
    return lines


def label_requests(task: Task) -> dict[str, str]:
    """What is wished of a text of each label: the task's instruction and the label's text. Raises `ConfigError` for a task
    without labels: nothing can be written for it, and nothing voted on."""
    told = task.to_config()
    labels: Mapping[str, str] = told.get("labels") or {}
    if not has_labels(task):
        raise ConfigError(
            f"a task of kind {told.get('name')!r} has no list of labels to write for and to vote on, whoever writes the "
            "texts; examples are made for classifications only"
        )
    return {label: f"{told.get('instruction', '')} {text}".strip() for label, text in labels.items()}


def has_labels(task: Task) -> bool:
    """Whether examples can be made for it."""
    return bool(task.to_config().get("labels"))


def few_shot_prefix(wish: str, form: PromptTemplate) -> str:
    """What the writer continues: three wishes with a text for each, then the one at hand."""
    shown = "".join(form.shown.format(request=f"Write one sentence. {w}.", text=text) for w, text in SHOWN)
    return shown + form.asked.format(request=f"Write one sentence. {wish}.")


def clean_text(text: str, asked: str) -> tuple[str, str | None]:
    """The first line that says something, and why it cannot be used (None: it can).

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


def _writers(writer: Backbone, prompts: Mapping[str, Prompt]) -> list[tuple[str, Prompt]]:
    """The prototypes on the writer's own backbone by name, else the writer without a prompt."""
    own = [(name, prompt) for name, prompt in sorted(prompts.items()) if prompt.backbone == writer.fingerprint]
    return own or [(WRITER, Prompt(torch.zeros(0, writer.width), writer.fingerprint))]


def _generated(writer, prompt, openings, max_tokens, temperature, seed) -> list[str]:
    try:
        return writer.generate(prompt, openings, max_tokens, temperature=temperature, seed=seed)
    except BackboneError as error:
        raise BackboneError(
            f"no synthetic examples were written: {error}. Configure a writer that can (a causal_lm backbone, such as "
            "smollm2), or give seed texts: a file of public texts, one a line"
        ) from error


# ---------------------------------------------------------------- choosing


def vote_labels(
    model: Model,
    prompts: Mapping[str, Prompt],
    task: Task,
    examples: Sequence[SyntheticExample],
    least_agreement: float = 0.75,
) -> FilterResult:
    """The label that most of the prompts give each text, where their share is at least `least_agreement`.

    A text that was written for another label is dropped. Of labels with equally many votes the task's first wins.
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
    """The same texts with the labels that each prompt alone gives them: what a prototype is as a task."""
    found = zip(sorted(prompts), _labels(model, prompts, task, examples), strict=True)
    return {
        name: [replace(example, label=label, agreement=1.0) for example, label in zip(examples, labels, strict=True)]
        for name, labels in found
    }


def _labels(
    model: Model, prompts: Mapping[str, Prompt], task: Task, examples: Sequence[SyntheticExample]
) -> list[list]:
    """What each prompt, in the order of their names, answers to each text."""
    ordered = [prompt for _, prompt in sorted(prompts.items())]
    batch = task.encode(records(examples, labelled=False), model.backbone, ordered[0])
    answer = model.answer([Query(torch.stack([p.vectors_PD for p in ordered]), batch, outputs=True)])[0]
    return [task.predict(of_one, batch) for of_one in _one_by_one(answer)]


def _one_by_one(answer: Answer) -> list[Answer]:
    """The answer of each candidate prompt alone."""
    assert answer.outputs_KB is not None
    K, B = answer.loss_KB.shape
    rows_KB = torch.arange(K * B).view(K, B)
    return [Answer(answer.loss_KB[k : k + 1], None, answer.outputs_KB.select(rows_KB[k])) for k in range(K)]
