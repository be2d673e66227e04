"""SmolLM2 behind real servers: transformers' own (`pip install "transformers[serving]"`), and one that scores."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import small
from ficpd.backbones import catalog, causal_lm, openai_api, weights
from ficpd.backbones.query_engine import QueryEngine
from ficpd.library.library import PromptLibrary
from ficpd.tasks import classification
from ficpd.types import Prompt, Query
from remote import Served, serving

pytestmark = pytest.mark.slow
LABELS = {"good": "positive", "bad": "negative"}
TASK = {"instruction": "Sentiment of this review (positive or negative):", "labels": LABELS}
TEXTS = {
    "A wonderful film, I loved it.": "good",
    "Terrible. A waste of two hours.": "bad",
    "Awful, boring and far too long.": "bad",
}
HOW: Any = {"dtype": torch.float32, "attention": "eager", "device": small.CPU, "name": "openai_api"}


@pytest.fixture(scope="module")
def found() -> weights.Weights:
    return weights.resolve(catalog.NAMED["smollm2"].weights)


@pytest.fixture(scope="module")
def transformers_serve(found, tmp_path_factory):
    """Its URL and the model's name there."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(found.folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(tmp_path_factory.mktemp("serve") / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(600):
            assert process.poll() is None, "it ended"
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", str(found.folder)
    finally:
        process.terminate()
        process.wait(60)


def scores(backbone: openai_api.Endpoint, front: str) -> torch.Tensor:
    task = classification.build(classification.Config(**TASK))
    ids = torch.tensor(backbone.vocabulary.ids(front))[:, None]
    records = [small.Record(text, {"text": text, "target": target}) for text, target in TEXTS.items()]
    batch = task.encode(records, backbone, Prompt(ids, backbone.fingerprint))
    outputs = QueryEngine(backbone).answer([Query(ids[None], batch, outputs=True)])[0].outputs_KB
    assert outputs is not None
    assert outputs.scores_RN is not None
    return outputs.scores_RN


def test_transformers_own_serving_answers_in_text(transformers_serve):
    url, model = transformers_serve
    config = openai_api.Config(url=url, model=model, timeout=300, workers=1)
    backbone = openai_api.build(config, None, **HOW)
    assert not backbone.likelihoods
    told = scores(backbone, "read this review")
    assert set(told.flatten().tolist()) == {0.0, openai_api.WRONG_LOGPROB}
    assert backbone.asking.answered == 1 + 3, "the first probe had no likelihoods"
    assert told.argmax(1).tolist() != [1, 0, 0]


def test_a_federation_on_transformers_own_serving_leaves_words(transformers_serve, tmp_path):
    url, model = transformers_serve
    options = f'{{ url = "{url}", model = "{model}", timeout = 300.0, workers = 1 }}'
    small.run(
        tmp_path, "feddtpt", "backbone.name=openai_api", f"backbone.options={options}", "training.batch_size=2",
        "training.local_steps=1", "method.candidates=1", "data.max_records=12", rounds=1,
    )  # fmt: skip
    library = PromptLibrary.load(tmp_path / "run")
    assert len(library.card["words"]["global"].split()) >= 1
    assert library.prompts["global"].vectors_PD.dtype == torch.int64


def test_a_server_that_scores_says_what_the_model_itself_does(found):
    options: Any = {**HOW, "name": "smollm2"}
    here = causal_lm.build(causal_lm.Config(), found, **options)
    with serving(Served(here.model, here.tokenizer)) as served:
        config = openai_api.Config(url=served.url, model="smollm2", words=str(found.folder))
        backbone = openai_api.build(config, None, **HOW)
        assert backbone.likelihoods
        told = scores(backbone, "read this review")
        for row, text in enumerate(TEXTS):
            before = here.tokenizer(f"read this review\n{text}\n{TASK['instruction']}")["input_ids"]
            for column, answer in enumerate(TASK["labels"].values()):
                tail = here.tokenizer(f" {answer}")["input_ids"]
                with torch.no_grad():
                    likely = here.model(torch.tensor([before + tail])).logits[0].log_softmax(-1)
                own = [float(likely[len(before) + i - 1, token]) for i, token in enumerate(tail)]
                assert float(told[row, column]) == pytest.approx(sum(own) / len(own), abs=1e-3)
        assert told.argmax(1).tolist() != [1, 0, 0]
