"""Synthetic examples: what is written, which texts are kept, how prompts vote, and the file that people read."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

import decoders
import small
from ficpd.backbones import catalog, causal_lm, weights
from ficpd.errors import BackboneError, ConfigError, DataError
from ficpd.library.distillation import filters, generation
from ficpd.library.distillation.filters import FilterResult, SyntheticExample, balanced
from ficpd.types import Prompt, Query, Record


def example(text: str, label: str | None = "good", prototype: str = "a", agreement: float = 1.0) -> SyntheticExample:
    return SyntheticExample(text, label, prototype, agreement)


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A random decoder: what it writes is words, if no sense."""
    return decoders.load(decoders.write(tmp_path_factory.mktemp("llama")))


BRIEF = generation.PromptTemplate("", "{request}")
"""The small decoder's context has no room for demonstrations."""


def written(writer, prompts=None, per_label: int = 6, seed: int = 0, **more) -> FilterResult:
    how = {"form": BRIEF, "max_tokens": 12, **more}
    return generation.generate_texts(writer, prompts or {}, small.classes(), per_label, seed, **how)


def test_a_bare_writer_writes_for_every_label(writer):
    made = written(writer, temperature=1.0)
    assert made.examples
    assert {e.prototype for e in made.examples} == {generation.WRITER}
    assert {e.label for e in made.examples} == {"good", "bad"}
    assert len(made.examples) + made.dropped.total() == 12
    assert all("\n" not in e.text and len(e.text.split()) >= 3 for e in made.examples)


def test_the_seed_fixes_what_is_written(writer):
    assert written(writer, temperature=1.0) == written(writer, temperature=1.0)
    assert written(writer, temperature=1.0, seed=1) != written(writer, temperature=1.0)


def test_prototypes_of_the_writers_own_take_turns(writer):
    rows = [torch.randn(2, writer.width, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    prompts = {name: Prompt(own, writer.fingerprint) for name, own in zip("ab", rows, strict=True)}
    made = written(writer, prompts, per_label=10, temperature=1.0)
    assert {(e.prototype, e.label) for e in made.examples} == {(p, label) for p in "ab" for label in ("good", "bad")}
    bare = written(writer, per_label=10, temperature=1.0)
    assert {e.text for e in made.examples} != {e.text for e in bare.examples}


def test_prototypes_of_another_backbone_do_not_write(writer):
    other = {"a": Prompt(torch.randn(2, 99), "encoder:1234")}
    assert written(writer, other) == written(writer)


def test_a_writer_is_asked_for_the_instruction_and_the_labels_text():
    assert generation.label_requests(small.classes()) == {"good": "it was good fine", "bad": "it was bad dull"}
    asked = generation.few_shot_prefix("it was bad dull", generation.CHAT)
    assert asked.endswith("user\nWrite one sentence. it was bad dull.<|im_end|>\n<|im_start|>assistant\n")
    assert asked.count("Write one sentence.") == 1 + len(generation.SHOWN)


def test_a_backbone_that_cannot_write_says_what_to_configure(model):
    with pytest.raises(BackboneError, match=r"tiny.*Configure a causal_lm.*public texts"):
        generation.generate_texts(model.backbone, {}, small.classes(), 3, 0)


def test_a_task_without_labels_cannot_be_written_for(writer):
    with pytest.raises(ConfigError, match=r"regression.*expected a classification"):
        generation.generate_texts(writer, {}, small.numbers(), 3, 0)


@pytest.mark.parametrize(("text", "line", "reason"), [
    ("  The match was long.\nIt rained.", "The match was long.", None),
    ("Sure, here is a sentence:\n\n- “The match was long.”", "The match was long.", None),
    ("2. The match was long.", "The match was long.", None),
    ("\n  \n", "", "blank"),
    ("Here you are:", "", "blank"),
    ("Very good.", "Very good.", "too short"),
    ("<a href='x1'>#1</a> {3: 4}", "<a href='x1'>#1</a> {3: 4}", "no text"),
    ("Write one sentence. It was bad dull!", "Write one sentence. It was bad dull!", "repeats the request"),
    ("I'm sorry, but I cannot do that.", "I'm sorry, but I cannot do that.", "speaks of itself"),
    ("I'm sorry that I bought it.", "I'm sorry that I bought it.", None),
    ("Das Spiel war zu lang.", "Das Spiel war zu lang.", None),
])  # fmt: skip
def test_drafts_are_cleaned(text, line, reason):
    assert generation.clean_text(text, "Write one sentence. It was bad dull.") == (line, reason)


def test_public_texts_need_no_writer(tmp_path):
    file = tmp_path / "public.txt"
    file.write_text("The film was long and grey.\n\nno\nThe film was long and grey!\nWe saw a lovely story.\n")
    made = generation.from_texts(generation.read_texts(file))
    assert [e.text for e in made.examples] == ["The film was long and grey.", "We saw a lovely story."]
    assert {(e.label, e.prototype) for e in made.examples} == {(None, generation.PUBLIC)}
    assert made.dropped == {"too short": 1, "near duplicate": 1}


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe\xfa"])
def test_a_file_without_texts_is_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / "public.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"public\.txt.*one a line|public\.txt.*one text a line"):
        generation.read_texts(tmp_path / "public.txt")


def test_nonsense_is_the_last_resort(model):
    made = generation.from_nonsense(model.backbone, 5, 0)
    assert len({e.text for e in made.examples}) == 5
    assert {(e.label, e.prototype) for e in made.examples} == {(None, generation.NONSENSE)}
    assert generation.from_nonsense(model.backbone, 5, 0) == made != generation.from_nonsense(model.backbone, 5, 1)


def voters(model, number: int = 4, spread: float = 0.5) -> dict[str, Prompt]:
    """Prompts around the start that answer differently."""
    begin = small.start(model, small.classes())
    random = torch.Generator().manual_seed(0)
    shape = begin.vectors_PD.shape
    offsets = [spread * torch.randn(shape, generator=random) for _ in range(number)]
    return {f"p{i}": begin.with_vectors(begin.vectors_PD + offset) for i, offset in enumerate(offsets)}


def ballots(model, prompts, examples) -> list[list[str]]:
    """Each prompt's labels, by its loss on either."""
    task, begin, found = small.classes(), next(iter(prompts.values())), []
    stacked = torch.stack([prompt.vectors_PD for prompt in prompts.values()])
    losses = []
    for label in ("good", "bad"):
        batch = task.encode(filters.records([replace(e, label=label) for e in examples]), model.backbone, begin)
        losses.append(model.answer([Query(stacked, batch)])[0].loss_KB)
    for b in range(len(examples)):
        found.append(["good" if g < n else "bad" for g, n in zip(losses[0][:, b], losses[1][:, b], strict=True)])
    return found


def texts(count: int = 60) -> list[SyntheticExample]:
    return [example(r.fields["text"], None) for r in small.records(count)]


def test_a_vote_keeps_what_prompts_agree_on(model):
    prompts, examples = voters(model, spread=2.0), texts()
    made, votes = generation.vote_labels(model, prompts, small.classes(), examples), ballots(model, prompts, examples)
    agreed = {e.text: max(v.count("good"), v.count("bad")) / 4 for e, v in zip(examples, votes, strict=True)}
    assert {e.text: e.agreement for e in made.examples} == {t: a for t, a in agreed.items() if a >= 0.75}
    winner = {e.text: max(("good", "bad"), key=v.count) for e, v in zip(examples, votes, strict=True)}
    assert all(e.label == winner[e.text] for e in made.examples)
    assert made.dropped == {"prototypes disagree": 60 - len(made.examples)}
    assert {0.75, 1.0} == {e.agreement for e in made.examples}


def test_unanimity_can_be_asked_for(model):
    made = generation.vote_labels(model, voters(model, spread=2.0), small.classes(), texts(), least_agreement=1.0)
    assert {e.agreement for e in made.examples} == {1.0}


def test_a_text_written_for_another_label_is_dropped(model):
    prompts, task = voters(model), small.classes()
    sure = generation.vote_labels(model, prompts, task, texts(), least_agreement=1.0).examples
    other = {"good": "bad", "bad": "good"}
    lying = [replace(e, label=other[e.label]) if i % 3 == 0 else e for i, e in enumerate(sure)]
    made = generation.vote_labels(model, prompts, task, lying, least_agreement=1.0)
    assert made.examples == [e for i, e in enumerate(sure) if i % 3]
    assert made.dropped == {"voted for another label": -(-len(sure) // 3)}


def test_the_order_of_prompts_does_not_matter(model):
    prompts = voters(model, spread=2.0)
    backwards = dict(reversed(prompts.items()))
    votes = [generation.vote_labels(model, given, small.classes(), texts()) for given in (backwards, prompts)]
    assert votes[0] == votes[1]


def test_nothing_to_vote_on_and_nobody_to_vote(model):
    assert generation.vote_labels(model, voters(model), small.classes(), []) == ([], Counter())
    made = generation.vote_labels(model, {}, small.classes(), texts(3))
    assert (made.examples, made.summary()) == ([], "0 examples; dropped: 3 no prompt to vote")


def test_near_duplicates_are_dropped():
    long = "we saw the film twice and it was a lovely story about a small town by the sea"
    examples = [example(long), example(long.upper() + "!!"), example(long + " indeed"), example("the film was dull")]
    made = filters.distinct([*examples, example("the film was dull then"), example("we saw")])
    assert [e.text for e in made.examples] == [long, "the film was dull", "the film was dull then", "we saw"]
    assert made.dropped == {"near duplicate": 2}


def test_the_jaccard_bound_is_seven_tenths():
    first = example("a b c d e f g h i j k l")  # ten runs of three words
    alike, apart = example("a b c d e f g h i x"), example("a b c d e f g h i j k l m n o p")
    assert filters.distinct([first, example("a b c d e f g h i")]).examples == [first]  # 7 of 10
    assert filters.distinct([first, alike]).examples == [first, alike]  # 7 of 11
    assert filters.distinct([first, apart]).examples == [first]  # 10 of 14


def test_labels_are_balanced_and_the_surest_stay():
    many = [example(f"good {i}", "good", agreement=0.7 + i / 100) for i in range(10)]
    few = [example(f"bad {i}", "bad", agreement=0.8) for i in range(2)]
    made = balanced([*many, *few], ratio=2.0)
    assert Counter(e.label for e in made.examples) == {"good": 4, "bad": 2}
    assert {e.text for e in made.examples if e.label == "good"} == {f"good {i}" for i in range(6, 10)}
    assert made.dropped == {"more than its label's share": 6}
    assert balanced([]) == ([], Counter())


def test_steps_follow_one_another_and_nothing_surviving_is_no_error():
    start = FilterResult([example("we saw it"), example("We saw it!")], Counter(blank=2, **{"near duplicate": 1}))
    made = start.then(filters.distinct).then(lambda some: FilterResult([], Counter({"prototypes disagree": len(some)})))
    assert made == ([], {"blank": 2, "near duplicate": 2, "prototypes disagree": 1})
    assert made.summary() == "0 examples; dropped: 2 blank, 2 near duplicate, 1 prototypes disagree"


NOTE = "Patient complains of chest pain since Tuesday and was sent home with aspirin"


@pytest.mark.parametrize(("text", "found"), [
    ("She COMPLAINS of chest-pain, since Tuesday; and was sent away", True),
    ("complains of chest pain since Tuesday and we", False),
    ("A patient who has pain in the chest was sent home with aspirin on Tuesday", False),
    ("I said the film was grey and dull today", True),
    ("the film was grey and quite dull", False),
    ("Lovely", True),
    ("It was a lovely story about the sea", False),
    ("good", False),
])  # fmt: skip
def test_a_planted_copy_is_found_and_nothing_else(text, found):
    private = [
        Record("a", {"text": NOTE, "target": "good"}),
        Record("b", {"text": "The film was grey and dull."}),
        Record("c", {"text": "lovely"}),
    ]
    assert filters.memorised([example(text)], private) == ([example(text)] if found else [])


def test_pairs_count_and_memorised_examples_are_removed_and_counted():
    private = [Record("a", {"text": "nothing to see here today", "text_pair": NOTE})]
    examples = [example("we saw it twice"), example(NOTE), example("and a third one")]
    made = filters.drop_memorised(examples, private)
    assert (made.examples, made.dropped) == ([examples[0], examples[2]], {"memorised": 1})
    assert filters.memorised([example(" ".join(NOTE.split()[:6]))], private) == []
    assert len(filters.memorised([example(" ".join(NOTE.split()[:6]))], private, words=6)) == 1


def test_the_file_comes_back_and_people_can_read_it(tmp_path):
    examples = [
        example("Zu spät – “naïve”", "good", "prototype-1", 0.75),
        example("a line\u2028separator", None, generation.PUBLIC),
        example("An early one", "bad"),
    ]
    filters.save(examples, tmp_path / "deep" / "synthetic.jsonl")
    lines = (tmp_path / "deep" / "synthetic.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["label"] for line in lines[:-1]] == [None, "bad", "good"]
    assert lines[2] == '{"text": "Zu spät – “naïve”", "label": "good", "prototype": "prototype-1", "agreement": 0.75}'
    assert filters.load(tmp_path / "deep" / "synthetic.jsonl") == [examples[1], examples[2], examples[0]]
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["synthetic.jsonl"]


def test_an_empty_set_is_an_empty_file(tmp_path):
    filters.save([], tmp_path / "synthetic.jsonl")
    assert filters.load(tmp_path / "synthetic.jsonl") == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    filters.save([example("we saw it")], tmp_path / "s.jsonl")
    with pytest.raises(TypeError):
        filters.save([example(object())], tmp_path / "s.jsonl")  # type: ignore[arg-type]
    assert filters.load(tmp_path / "s.jsonl") == [example("we saw it")]


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": "a"}', '{"text": "a", "label": "b", "who": "c"}', "7"])
def test_a_line_that_is_no_example_is_named(tmp_path, line):
    filters.save([example("we saw it")], tmp_path / "s.jsonl")
    with (tmp_path / "s.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"s\.jsonl line 2: expected an object with text"):
        filters.load(tmp_path / "s.jsonl")


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        filters.load(tmp_path / "s.jsonl")


@pytest.mark.slow
def test_smollm2_writes_for_two_labels():
    found = weights.resolve(catalog.NAMED["smollm2"].weights)
    how = {"dtype": torch.float32, "attention": "sdpa", "device": small.CPU, "name": "smollm2"}
    writer = causal_lm.build(causal_lm.Config(), found, **how)
    labels = {"sports": "sports", "health": "health"}
    task = small.classes(labels=labels, instruction="This text is about")
    made = generation.generate_texts(writer, {}, task, 4, 0)
    assert {e.label for e in made.examples} == {"sports", "health"}
    assert all(sum(c.isalpha() or c.isspace() for c in e.text) > 0.6 * len(e.text) for e in made.examples)
    assert all(len(e.text.split()) >= 3 and "<|" not in e.text and "\n" not in e.text for e in made.examples)
    assert not any(text in e.text for e in made.examples for _, text in generation.SHOWN)
