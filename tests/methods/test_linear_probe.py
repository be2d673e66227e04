"""Linear probe: a head of each client's own on frozen features, nothing tuned, nothing sent."""

import pytest
import torch

import small
from ficpd.backbones.query_engine import QueryEngine
from ficpd.errors import ConfigError
from ficpd.evaluation.evaluate import evaluate
from ficpd.federation.execution import local_model
from ficpd.methods import linear_probe
from ficpd.methods.shared.heads import MIN_RECORDS
from ficpd.tasks import classification
from ficpd.types import Answer, ModelOutput, Record

UNTELLING = {"good": "twice", "bad": "story"}
"""Label texts that say nothing about the labels."""


def task(**labels: str) -> classification.Classification:
    return classification.build(classification.Config(labels=labels or UNTELLING, instruction="it was"))


def predicted(model, name: str, train: list[Record], of: classification.Classification) -> list[str]:
    """One client's predictions of 100 test records."""
    method = small.method(name)
    clients = small.clients(model, method, 1, task=of)
    clients["site-0"].train, clients["site-0"].test = train, small.records(100, 100)
    return evaluate(method, small.first_state(method, clients), clients, model, 1).predicted["site-0"]


def accuracy(model, name: str, train: list[Record], of: classification.Classification) -> float:
    truth = [record.fields["target"] for record in small.records(100, 100)]
    found = predicted(model, name, train, of)
    return sum(a == b for a, b in zip(found, truth, strict=True)) / len(truth)


def test_a_probe_learns_what_the_label_texts_do_not_tell():
    model = QueryEngine(small.backbone(width=32))
    assert accuracy(model, "linear_probe", small.records(200), task()) > 0.9
    assert accuracy(model, "zero_shot", small.records(200), task()) < 0.8


def test_every_candidate_can_be_the_one_that_predicts(model, monkeypatch):
    """Four labels in four corners: heads separate them; label texts that separate them already are kept."""
    labels = task(a="good", b="bad", c="dull", d="fine")
    records = [Record(f"r{i}", {"text": "the film", "target": "abcd"[i % 4]}) for i in range(40)]
    client = small.clients(model, small.method("linear_probe"), 1, task=labels)["site-0"]
    client.train = records
    batch = client.encoded()
    targets_B = batch.targets
    noise_BD = torch.randn(40, model.backbone.width, generator=torch.Generator().manual_seed(0))
    corners_BD = torch.eye(4, model.backbone.width)[targets_B] + 0.05 * noise_BD
    readings = linear_probe._readings(ModelOutput(corners_BD), batch, targets_B)
    assert len(readings) == 2 + 2 * len(linear_probe.PENALTIES)
    for loo_BC, read in readings[1:]:
        assert (loo_BC.argmax(1) == targets_B).all()
        assert (read(ModelOutput(corners_BD), batch).argmax(1) == targets_B).all()
    monkeypatch.setattr(linear_probe, "_by_texts", lambda outputs, batch: 30.0 * torch.eye(4)[batch.targets])
    assert chosen_logits(client, ModelOutput(corners_BD)).argmax(1).equal(targets_B)


def chosen_logits(client, outputs: ModelOutput) -> torch.Tensor:
    method = small.method("linear_probe")
    assignment = method.make_assignment(small.first_state(method, {"site-0": client}), client.card, 1)
    work = local_model(method, client, assignment)
    query = next(work)
    assert query.prompts_KPD.shape == (1, 0, client.backbone.width)
    with pytest.raises(StopIteration) as done:
        work.send(Answer(torch.zeros(1, len(outputs.features_RD)), outputs_KB=outputs))
    (predictor,) = done.value.value
    return predictor.logits(outputs, client.encoded())


def clients_records(kind: str) -> list[Record]:
    records = small.records(20)
    if kind == "one record":
        return records[:1]
    if kind == "too few for a head":
        return records[: MIN_RECORDS - 1]
    if kind == "one label":
        return [record for record in records if record.fields["target"] == "good"]
    return [Record(r.key, {**r.fields, "text": "the film"}) for r in records]


@pytest.mark.parametrize("kind", ["one record", "too few for a head", "one label", "constant features"])
@pytest.mark.parametrize("labels", [small.LABELS, {**small.LABELS, "unseen": "story"}])
def test_clients_that_have_little_to_learn_from_still_predict(model, kind, labels):
    found = predicted(model, "linear_probe", clients_records(kind), task(**labels))
    assert len(found) == 100
    assert set(found) <= set(labels)
    if kind == "one record":
        assert found == predicted(model, "zero_shot", clients_records(kind), task(**labels))


def test_a_client_of_one_label_keeps_the_label_texts_under_its_label_prior(model):
    labels, records = task(**small.LABELS), clients_records("one label")
    zero_shot, own = (predicted(model, name, records, labels) for name in ("zero_shot", "linear_probe"))
    assert own.count("good") >= zero_shot.count("good")
    client = small.clients(model, small.method("linear_probe"), 1, task=labels)["site-0"]
    client.train = records
    outputs = ModelOutput(torch.zeros(len(records), model.backbone.width))
    assert len(linear_probe._readings(outputs, client.encoded(), client.encoded().targets)) == 1
    assert (chosen_logits(client, outputs).argmax(1) == client.encoded().targets).all()


def test_a_backbone_without_features_is_refused(model):
    method = small.method("linear_probe")
    method.check_compatible([small.classes()], model.backbone)
    model.backbone.supports_features = False
    with pytest.raises(ConfigError, match=r"linear_probe: .*tiny"):
        method.check_compatible([small.classes()], model.backbone)
