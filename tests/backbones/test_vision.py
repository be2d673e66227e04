"""Vision transformers: what they say without a prompt is what transformers' own forward says, at every image size."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

import sights
import small
from ficpd.backbones import autotune, catalog, vision
from ficpd.backbones.lora import lora_of
from ficpd.backbones.query_engine import QueryEngine
from ficpd.backbones.weights import Weights
from ficpd.data.images import LazyImage
from ficpd.errors import BackboneError
from ficpd.experiments.config import parse
from ficpd.experiments.head_init import class_means
from ficpd.experiments.initialization import public_gradients
from ficpd.experiments.runner import run
from ficpd.tasks import classification, synthetic_records
from ficpd.types import LORA, Batch, Prompt, Query

IMAGES = [sights.Seen(text) for text in ("a", "b", "c", "d", "e")]
WRITE = {"dinov2": sights.write_dinov2, "vit": sights.write_vit, "clip": sights.write_clip}


@pytest.fixture(scope="module", params=WRITE)
def folder(request, tmp_path_factory) -> Path:
    return WRITE[request.param](tmp_path_factory.mktemp(request.param))


def load(folder: Path, attention: str = "eager", **options: Any) -> vision.Vision:
    given = {"dtype": torch.float32, "attention": attention, "device": small.CPU, "name": "small"}
    return vision.build(vision.Config(**options), Weights(folder, "ab" * 32, "here"), **given)


def said(backbone: vision.Vision, layer: int = 0) -> torch.Tensor:
    items = [backbone.preprocess_image(image, 0) for image in IMAGES]
    none = torch.zeros(len(items), 0, backbone.width)
    return backbone.forward(none, backbone.encode_prefix(items, layer), items, layer).features_RD


def theirs(folder: Path, side: int | None) -> dict[str, torch.Tensor]:
    """What transformers makes of the images, cut to a square of so many pixels."""
    processor, sizes = AutoImageProcessor.from_pretrained(folder, backend="pil"), {}
    if side:
        cuts, square = bool(getattr(processor, "do_center_crop", False)), {"height": side, "width": side}
        larger = {"size": {"shortest_edge": round(20 * side / 16)}, "crop_size": square}
        sizes = larger if cuts else {"size": square}
    return processor([image.open() for image in IMAGES], return_tensors="pt", **sizes)


@pytest.mark.parametrize("side", [None, 8, 24])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_a_prompt_it_is_the_model_itself(folder, side, attention):
    backbone, model = load(folder, attention, image_size=side), AutoModel.from_pretrained(folder).eval()
    assert backbone.preprocess_image(IMAGES[0], 0).length == ((side or 16) // 4) ** 2 + 1
    pixels = theirs(folder, side)
    with torch.no_grad():
        if backbone.has_text_encoder:
            own = model.vision_model(**pixels, interpolate_pos_encoding=True).pooler_output
            features = own / model.visual_projection(own).norm(dim=-1, keepdim=True)
        else:
            more = {} if model.config.model_type == "dinov2" else {"interpolate_pos_encoding": True}
            features = F.normalize(model(**pixels, **more).last_hidden_state[:, 0], dim=-1)
    for layer in range(backbone.depth):
        assert small.close(said(backbone, layer), features)


@pytest.mark.parametrize("side", [None, 8])
def test_clips_answers_are_scored_as_clip_does(tmp_path, side):
    folder, answers = sights.write_clip(tmp_path), ["good", "bad", "a film", "the very story"]
    backbone, model = load(folder, image_size=side), AutoModel.from_pretrained(folder).eval()
    photos = [f"a photo of {a}" for a in answers]
    words = AutoTokenizer.from_pretrained(folder)(photos, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**words, **theirs(folder, side), interpolate_pos_encoding=True).logits_per_image
    ours = said(backbone) @ backbone.readout("a photo of", answers).T
    assert small.close(ours, logits)
    assert logits.std() > 0.5
    alone = torch.cat([backbone.readout("a photo of", [answer]) for answer in answers])
    assert small.close(alone, backbone.readout("a photo of", answers))


def test_a_tuned_head_of_clip_is_as_long_as_its_texts(tmp_path):
    """Texts in all directions of the common space: the root mean square of their readouts' lengths."""
    backbone = load(sights.write_clip(tmp_path))
    every = backbone.scale * backbone.projection_ND
    heads = backbone.head_to_readout(every[None])[0]
    assert small.close(F.normalize(heads, dim=-1), F.normalize(every, dim=-1))
    assert small.close(heads.norm(dim=-1), every.square().sum(-1).mean().sqrt().expand(len(every)), 1e-4)


def test_a_folder_says_that_it_sees(folder):
    assert catalog.detect_kind(folder) == "vision"
    assert catalog.defaults("a/name", "vision", 12).enters_at == 6


def test_what_is_no_vision_transformer_is_refused(folder, tmp_path):
    odd = "image_size: 10 pixels are no multiple of small's patches of 4; take 8 or 12"
    with pytest.raises(BackboneError, match=odd):
        load(folder, image_size=10)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            os.link(folder / name, tmp_path / name)
    with pytest.raises(BackboneError, match="cannot be read as a vision transformer"):
        load(tmp_path)
    processor |= {"do_center_crop": False, "size": {"shortest_edge": 20}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(BackboneError, match="no squares of one size"):
        load(tmp_path)


class Counted:
    """How often it was opened."""

    times = 0

    def open(self) -> Image.Image:
        self.times += 1
        return IMAGES[0].open()


def test_pixels_are_decoded_where_they_are_looked_at_and_nowhere_kept(folder):
    backbone, image = load(folder), Counted()
    model, item = QueryEngine(backbone), backbone.preprocess_image(image, 3)
    assert image.times == 0
    for _ in range(2):
        kept = model.kept.fetch([item], 1, backbone)
        assert (image.times, item.content) == (1, image)
    assert [state.shape for state in kept] == [(17, 32)]
    QueryEngine(backbone, keep_bytes=0).kept.fetch([item], 1, backbone)
    assert image.times == 2


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (1, 40), (200, 30)])
def test_an_image_of_any_shape_is_seen(folder, size, tmp_path):
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(tmp_path / "a.png")
    backbone = load(folder)
    (state,) = backbone.encode_prefix([backbone.preprocess_image(LazyImage("a", tmp_path / "a.png"), 0)], 0)
    assert state.shape == (17, 32)
    assert torch.isfinite(state).all()


def labels(number: int, **more: Any) -> classification.Classification:
    return classification.build(classification.Config(labels={str(i): "good" for i in range(number)}, **more))


def test_what_the_server_asks_with_made_up_records_can_be_seen(folder):
    backbone = load(folder)
    model = QueryEngine(backbone)
    tokens, head = backbone.init_prompt(None, 3, 1, 0), backbone.init_prompt(None, 2, 0, 1)
    start = Prompt(torch.cat([tokens, head]), backbone.fingerprint, 1, 2)
    gradients = public_gradients(model, [labels(2, tuned_head=True)], start, 0, 6)
    assert gradients.shape == (6, 5, 32)
    assert gradients.abs().amax((1, 2)).min() > 0
    assert autotune.step_seconds(backbone, repeats=1) > 0
    (record,) = synthetic_records(backbone, 1, 0)
    assert record.fields["image"].open().size == (vision.SIDE, vision.SIDE)


def test_its_weights_can_be_changed(folder):
    """LoRA weights as they begin change nothing; others do."""
    backbone = load(folder)
    rows_PD, items = lora_of(backbone).start(2, 0), tuple((backbone.preprocess_image(image, 0),) for image in IMAGES)
    query = Query(torch.stack([rows_PD, rows_PD + 0.1]), Batch(labels(2), items, None, None, LORA), outputs=True)
    same, other = QueryEngine(backbone).answer([query])[0].outputs_KB.features_RD.split(len(IMAGES))
    assert small.close(same, said(backbone))
    assert not small.close(other, same, 0.01)


def test_the_class_means_of_one_example_each_are_their_features(folder):
    backbone = load(folder)
    records = [small.Record(str(i), {"image": image, "target": str(i)}) for i, image in enumerate(IMAGES)]
    rows_CD = class_means(labels(5, tuned_head=True), backbone, records)
    assert small.close(rows_CD, said(backbone))
    if not backbone.has_text_encoder:  # CLIP's features have no length of their own
        assert (said(backbone) @ backbone.head_to_readout(rows_CD).T).argmax(-1).tolist() == [*range(5)]


SHARED = Path(__file__).parents[3] / "shared"
DINO, MNIST = SHARED / "models" / "dinov2-small", SHARED / "data" / "mnist_t10k.parquet"


@pytest.mark.slow
@pytest.mark.skipif(
    not (DINO.is_dir() and MNIST.is_file()), reason="no shared/models/dinov2-small or shared/data/mnist_t10k"
)
def test_dinov2_learns_digits_from_what_ten_of_each_began(tmp_path):
    """Class means of ten public images of each digit, and a few rounds of four clients."""
    table = pq.read_table(MNIST).to_pandas()
    public = table[table["split"] == "train"].groupby("label").head(10)
    rest = table.drop(public.index)
    public.to_parquet(tmp_path / "public.parquet")
    sides = (
        rest[rest["split"] == side].sample(number, random_state=0) for side, number in (("train", 600), ("test", 300))
    )
    rows = [row for part in sides for row in part.to_dict("records")]
    type(table)().from_records(rows).to_parquet(tmp_path / "own.parquet")
    labels = ", ".join(f'{d} = "the digit {d}"' for d in range(10))
    whole = parse(
        f"""
baselines = []
[backbone]
name = {json.dumps(str(DINO))}
dtype = "float32"
attention = "sdpa"
options = {{ image_size = 98 }}
[prompt]
head_examples = {json.dumps(str(tmp_path / "public.parquet"))}
[task]
name = "classification"
labels = {{ {labels} }}
tuned_head = true
[data]
source = {json.dumps(str(tmp_path / "own.parquet"))}
columns = {{ image = "image", target = "label" }}
keep = ["writer_group"]
split_column = "split"
[partition]
kind = "column_dirichlet"
column = "writer_group"
num_clients = 4
concentration = 10.0
[method]
name = "fedavg"
[training]
local_steps = 8
batch_size = 16
[federation]
num_rounds = 4
""",
        "mnist.toml",
    )
    began = time.perf_counter()
    metrics = run(whole, tmp_path / "run").scores
    print(f"{time.perf_counter() - began:.0f} s", metrics.zero_shot, metrics.global_prompt)
    assert metrics.zero_shot["accuracy"] > 0.4
    assert metrics.global_prompt["accuracy"] > metrics.zero_shot["accuracy"] + 0.1
