"""The one idea in ten lines: ask a frozen backbone how two candidate prompts do on three records."""

import torch

from ficpd.backbones.loading import BackboneConfig, EngineConfig, load_backbone
from ficpd.backbones.query_engine import QueryEngine
from ficpd.tasks.build import build_task
from ficpd.types import Prompt, Query, Record

backbone, _ = load_backbone(BackboneConfig(name="tiny"), EngineConfig())
task = build_task({"name": "classification", "labels": {"bad": "bad", "good": "good"}})
texts = {"a dull film": "bad", "a lovely film": "good", "lovely": "good"}
records = [Record(text, {"text": text, "target": label}) for text, label in texts.items()]
start = Prompt(backbone.init_prompt("a good film", 4, 1, seed=0), backbone.fingerprint, enters_at=1)

candidates_KPD = torch.stack([start.vectors_PD, torch.zeros_like(start.vectors_PD)])
answer = QueryEngine(backbone).answer([Query(candidates_KPD, task.encode(records, backbone, start), grad=True)])[0]
print("a loss per candidate and record:", answer.loss_KB.shape)
print("a gradient per candidate and record:", answer.grad_KBPD.shape)
