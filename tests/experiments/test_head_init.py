"""Where a tuned head starts, on a backbone of texts; on those that see, tests/test_images_run.py."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import small
from ficpd.data.loading import Config
from ficpd.errors import ConfigError, DataError
from ficpd.experiments.build import build_context
from ficpd.experiments.head_init import examples, init_head


def csv(path: Path, *rows: tuple[str, str]) -> str:
    path.write_text("review,stars\n" + "".join(f"{text},{target}\n" for text, target in rows))
    return str(path)


def test_without_examples_it_is_the_answers_texts():
    backbone, task = small.backbone(), small.classes(tuned_head=True)
    rows_CD = init_head(task, backbone, None, 0)
    assert small.close(F.normalize(rows_CD, dim=-1) * 20, task.readout(backbone), 1e-4)
    assert small.close(rows_CD.square().mean(1), torch.ones(2))
    assert init_head(small.classes(), backbone, None, 0).shape == (0, backbone.width)


def test_with_examples_it_is_the_means_of_their_features():
    backbone, task, records = small.backbone(), small.classes(tuned_head=True), small.records(12)
    items = [backbone.tokenize(record.fields["text"], None, "", None, 0) for record in records]
    features = backbone.forward(torch.zeros(12, 0, 16), backbone.encode_prefix(items, 1), items, 1).features_RD
    good = torch.tensor([record.fields["target"] == "good" for record in records])
    means = torch.stack([features[good].mean(0), features[~good].mean(0)])
    rows_CD = init_head(task, backbone, records, 0)
    assert small.close(F.normalize(rows_CD, dim=-1), F.normalize(means, dim=-1))
    assert small.close(rows_CD.square().mean(1), torch.ones(2))


def test_a_run_of_texts_can_start_from_examples_too(tmp_path):
    public = small.table(tmp_path / "public.csv", 20)
    changes = ["task.tuned_head=true", f"prompt.head_examples={public}"]
    contexts = [build_context(small.experiment(tmp_path, "fedavg", *changes[:number])) for number in (1, 2)]
    heads = [context.start.vectors_PD[3:] for context in contexts]
    assert heads[0].shape == heads[1].shape == (2, 16)
    assert not small.close(*heads, 0.1)


def test_examples_are_read_in_the_columns_of_the_clients_own(tmp_path):
    public = csv(tmp_path / "public.csv", ("fine film", "good"), ("dull film", "bad"))
    columns = {"text": "review", "target": "stars", "client": "site"}
    data = Config(source=str(tmp_path / "own.csv"), columns=columns, keep=("age",), split_column="side", max_records=2)
    found = [(r.fields["text"], r.fields["target"]) for r in examples(public, data)]
    assert found == [("fine film", "good"), ("dull film", "bad")]
    with pytest.raises(ConfigError, match="the clients' private records"):
        examples(str(tmp_path / "." / "own.csv"), data)
    with pytest.raises(DataError, match=r"prompt.head_examples: there is no file"):
        examples(str(tmp_path / "nowhere.csv"), data)


def test_a_class_without_an_example_and_a_task_without_classes_are_refused():
    good = [record for record in small.records(20) if record.fields["target"] == "good"]
    with pytest.raises(DataError, match=f"none of the {len(good)} records is bad"):
        init_head(small.classes(tuned_head=True), small.backbone(), good, 0)
    with pytest.raises(ConfigError, match="a regression has no classes"):
        init_head(small.numbers(tuned_head=True), small.backbone(), small.records(4, real=True), 0)
