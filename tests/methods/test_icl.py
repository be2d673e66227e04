"""In-context learning: a client's own examples beside its texts, nothing tuned, nothing sent."""

import pytest
import torch

import decoders
import small
from ficpd.backbones.query_engine import QueryEngine
from ficpd.evaluation.evaluate import evaluate, predictions_of
from ficpd.tasks import classification
from ficpd.types import Record

LABELS = {"good": "positive", "bad": "negative"}
"""Both are one token of the small decoder."""


def task() -> classification.Classification:
    return classification.build(classification.Config(labels=LABELS, instruction="sentiment is"))


def of(**rows: tuple[str, str]) -> list[Record]:
    return [Record(key, {"text": text, "target": target}) for key, (text, target) in rows.items()]


def members(model, method, **more):
    found = small.clients(model, method, 2, task=task(), **more)
    for client in found.values():
        client.train = of(a=("the film was fine", "good"), b=("very good", "good"), c=("dull and long", "bad"))
        client.test = of(x=("not bad", "good"), y=("bad", "bad"))
    return found


FIRST = "the film was fine\nsentiment is positive"
SECOND = "dull and long\nsentiment is negative"
THIRD = "very good\nsentiment is positive"


@pytest.mark.parametrize(("examples", "shown"), [(1, [FIRST]), (2, [FIRST, SECOND]), (32, [FIRST, SECOND, THIRD])])
def test_a_decoder_is_shown_the_clients_examples_before_each_text(decoder, monkeypatch, examples, shown):
    method = small.method("icl", examples=examples)
    clients, read = members(decoder, method), []
    monkeypatch.setattr("ficpd.evaluation.evaluate.predictions_of", reader(read))
    evaluate(method, small.first_state(method, clients), clients, decoder, 1)
    assert len(read) == len(clients)
    for (predictor,), batch in read:
        assert predictor.prompt_PD.shape == (0, decoder.backbone.width)
        texts = [decoder.backbone.tokenizer.decode(items[0].content) for items in batch.items]
        for text, own in zip(texts, ("not bad", "bad"), strict=True):
            whole = "\n\n".join([*shown, f"{own}\nsentiment is"])
            assert text.split() == decoder.backbone.tokenizer.decode(decoder.backbone._ids(whole)).split()


def reader(read):
    """`predictions_of` that notes what it is given."""
    return lambda task, given, batch: read.append((given, batch)) or predictions_of(task, given, batch)


def asked(model, method, clients, monkeypatch, site: str = "site-0") -> list[str]:
    """The first client's test texts as they reach the backbone."""
    read = []
    monkeypatch.setattr("ficpd.evaluation.evaluate.predictions_of", reader(read))
    evaluate(method, small.first_state(method, clients), clients, model, 1)
    batch = dict(zip(clients, (batch for _, batch in read), strict=True))[site]
    return [model.backbone.tokenizer.decode(items[0].content) for items in batch.items]


def narrow(llama, method, train: list[str]) -> tuple[QueryEngine, dict]:
    """Room for 24 tokens, a start of ten, and a text of sixteen words that fits if nothing stands beside it."""
    model = QueryEngine(decoders.load(llama, max_tokens=24))
    clients = members(model, method)
    client = clients["site-0"]
    client.start = client.start.with_vectors(torch.zeros(10, model.backbone.width))
    client.train = [Record(text, {"text": text, "target": "good"}) for text in train]
    client.test = [Record("x", {"text": " ".join(["good", "bad", "long", "dull"] * 4), "target": "good"})]
    return model, clients


def test_a_text_is_not_cut_for_examples_nor_for_virtual_tokens_that_are_not_there(llama, monkeypatch):
    method = small.method("icl")
    model, clients = narrow(llama, method, ["good"])
    (seen,) = asked(model, method, clients, monkeypatch)
    assert seen.split()[:16] == ["good", "bad", "long", "dull"] * 4


def test_examples_that_do_not_fit_are_left_out_and_the_text_is_not_cut(llama):
    model = QueryEngine(decoders.load(llama, max_tokens=24))
    method = small.method("icl")
    clients = members(model, method)
    client = clients["site-0"]
    client.test = [Record("x", {"text": "the film was not very good but fine and long", "target": "good"})]
    evaluation = evaluate(method, small.first_state(method, clients), clients, model, 1)
    assert len(evaluation.own) == 2
    assert evaluation.everyone is None


def test_examples_are_shown_up_to_the_first_that_does_not_fit(llama, monkeypatch):
    method = small.method("icl")
    model, clients = narrow(llama, method, ["fine", "the film was very long and very dull", "good"])
    clients["site-0"].test = [Record("x", {"text": "bad", "target": "bad"})]
    (seen,) = asked(model, method, clients, monkeypatch)
    assert seen.count("positive") == 1
    assert seen.startswith("fine")


def test_examples_help_where_the_labels_texts_say_nothing():
    """An encoder: each text is compared with the examples' own features, too."""
    model = QueryEngine(small.backbone(width=32))
    labels = classification.build(classification.Config(labels={"good": "twice", "bad": "story"}, instruction="it was"))
    accuracy = {}
    for name in ("icl", "zero_shot"):
        method = small.method(name)
        clients = small.clients(model, method, 3, task=labels)
        for place, client in enumerate(clients.values()):
            client.train, client.test = small.records(60, place), small.records(60, 100 + place)
        accuracy[name] = evaluate(method, small.first_state(method, clients), clients, model, 1).mean["accuracy"]
    assert accuracy["icl"] > accuracy["zero_shot"] + 0.1


def test_no_examples_is_no_setting():
    with pytest.raises(ValueError, match="examples"):
        small.method("icl", examples=0)
