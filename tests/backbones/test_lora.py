"""LoRA weights of each row's own: PEFT's numbers, features, gradients and texts, on small random models."""

from dataclasses import replace
from typing import Any, NamedTuple

import peft
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertModel

import decoders
import small
from ficpd.backbones import lora, sentence_encoder
from ficpd.backbones.loading import BackboneConfig, EngineConfig, load_backbone
from ficpd.backbones.query_engine import QueryEngine
from ficpd.errors import BackboneError
from ficpd.tasks import generation
from ficpd.types import LORA, Batch, EncodedInput, ModelOutput, Query

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
RANK = 8
NAMES = {"sentence_encoder": ["query", "value"], "causal_lm": ["q_proj", "v_proj"]}


class Case(NamedTuple):
    kind: str
    backbone: Any
    theirs: Any
    """A PEFT model on a copy of the same weights."""
    rows_KPD: Tensor
    """Two sets of LoRA weights."""


def bert() -> sentence_encoder.Encoder:
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=48, initializer_range=0.3,
    )  # fmt: skip
    return sentence_encoder.Encoder(sentence_encoder.Config(), BertModel(config), None, "ab" * 32, "small")


@pytest.fixture(params=NAMES)
def case(request, tmp_path) -> Case:
    made = [
        bert() if request.param == "sentence_encoder" else decoders.load(decoders.write(tmp_path)) for _ in range(2)
    ]
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=NAMES[request.param])
    theirs = peft.get_peft_model(made[1].model, config).eval()
    return Case(request.param, made[0], theirs, drawn(made[0], 2))


def drawn(backbone: Any, number: int, rank: int = RANK) -> Tensor:
    begin_PD = backbone.adapters.start(rank, 1)
    return torch.randn(number, *begin_PD.shape, generator=torch.Generator().manual_seed(2)) / 4


def batch() -> Batch:
    items = [EncodedInput(torch.arange(5, 5 + length), length) for length in (9, 3, 12)]
    return Batch(small.classes(), tuple((item,) for item in items), None, None, LORA)


def weights(case: Case, name: str) -> list[torch.nn.Parameter]:
    found = case.theirs.base_model.model.get_submodule(name)
    return [found.lora_A["default"].weight, found.lora_B["default"].weight]


def put(case: Case, rows_PD: Tensor) -> None:
    """The same A and B into PEFT's model."""
    for name, (down, up) in case.backbone.adapters.split(rows_PD).items():
        for weight, value in zip(weights(case, name), (down, up.mT), strict=True):
            weight.data.copy_(value)


def feature(case: Case, item: EncodedInput) -> Tensor:
    """What the backbone's feature is, by transformers' own forward."""
    ids, mask = item.content[None], torch.ones(1, item.length, dtype=torch.long)
    if case.kind == "sentence_encoder":
        states_TD = case.theirs(input_ids=ids, attention_mask=mask).last_hidden_state[0]
        return F.normalize(states_TD.mean(0), dim=0)
    return case.theirs(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1][0, -1]


def along(outputs: ModelOutput, batch: Batch) -> Tensor:
    """[R]: some loss that needs no task."""
    width = outputs.features_RD.shape[1]
    return (outputs.features_RD * torch.linspace(-3, 3, width)).sum(1)


def test_features_are_those_of_peft_for_every_row(case):
    outputs = QueryEngine(case.backbone).answer([Query(case.rows_KPD, batch(), outputs=True, loss=along)])[0].outputs_KB
    query = Query(case.rows_KPD[:1, :0], batch(), outputs=True, loss=along)
    bare = QueryEngine(case.backbone).answer([query])[0].outputs_KB
    assert outputs is not None
    assert bare is not None
    for k, rows_PD in enumerate(case.rows_KPD):
        put(case, rows_PD)
        for b, (item,) in enumerate(batch().items):
            with torch.no_grad():
                theirs = feature(case, item)
            assert small.close(outputs.features_RD[3 * k + b], theirs)
            assert not small.close(bare.features_RD[b], theirs, 1e-2)


def test_gradients_of_a_row_are_those_of_a_backward_of_its_own_in_peft(case):
    grad_KBPD = QueryEngine(case.backbone).answer([Query(case.rows_KPD, batch(), grad=True, loss=along)])[0].grad_KBPD
    assert grad_KBPD is not None
    for k, rows_PD in enumerate(case.rows_KPD):
        put(case, rows_PD)
        for b, (item,) in enumerate(batch().items):
            case.theirs.zero_grad()
            along(ModelOutput(feature(case, item)[None]), batch()).sum().backward()
            for name, (down, up) in case.backbone.adapters.split(grad_KBPD[k, b]).items():
                for ours, weight in zip((down, up.mT), weights(case, name), strict=True):
                    assert weight.grad is not None
                    longest = weight.grad.abs().max()
                    assert longest > 1e-3
                    assert small.close(ours / longest, weight.grad / longest, 1e-4)


def test_it_has_as_many_numbers_as_peft_counts(case):
    trained, _ = case.theirs.get_nb_trainable_parameters()
    assert case.backbone.adapters.parameters(RANK) == trained
    assert case.backbone.adapters.start(RANK, 0).numel() == trained  # of rank 8 they come out even


def test_it_starts_as_peft_does_and_changes_nothing(case):
    begin_PD = case.backbone.adapters.start(RANK, 1)
    for name, (down, up) in case.backbone.adapters.split(begin_PD).items():
        theirs_A, theirs_B = weights(case, name)
        assert not up.any()
        assert not theirs_B.any()
        bound = down.shape[1] ** -0.5
        assert 0.95 * bound < float(down.abs().max()) <= bound
        assert float(theirs_A.detach().abs().max()) <= bound
    model = QueryEngine(case.backbone)
    some = [model.answer([Query(rows[None], batch(), loss=along)])[0].loss_KB for rows in (begin_PD, begin_PD[:0])]
    assert torch.equal(*some)
    assert torch.equal(begin_PD, case.backbone.adapters.start(RANK, 1))
    assert not torch.equal(begin_PD, case.backbone.adapters.start(RANK, 2))


def test_a_rank_that_leaves_a_rest_ends_in_zeros_that_nothing_reads():
    """A value projection of two heads for four: 3 modules of 32 + 32 and 3 of 32 + 16 numbers for each rank."""
    heads = {"q_proj": torch.nn.Linear(32, 32), "v_proj": torch.nn.Linear(32, 16)}
    places = lora.Adapters(lambda: heads, 32)
    rows_PD = places.start(3, 0)
    assert places.parameters(3) == 3 * (64 + 48) == rows_PD.numel() - 16
    assert places.rank(rows_PD) == 3
    leaf = rows_PD.clone().requires_grad_()
    sum(part.sum() for parts in places.split(leaf).values() for part in parts).backward()  # type: ignore[union-attr]
    assert leaf.grad is not None
    assert leaf.grad.flatten().tolist() == [1.0] * places.parameters(3) + [0.0] * 16


def test_the_model_is_as_it_was_afterwards_even_if_a_forward_fails(case):
    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in case.backbone.adapters.modules.values())

    with case.backbone.adapters.applied(case.rows_KPD):
        assert hooks() == 6
    unknown = replace(batch(), items=((EncodedInput(torch.tensor([10**6]), 1),),))
    with pytest.raises(IndexError):
        QueryEngine(case.backbone).answer([Query(case.rows_KPD, unknown, loss=along)])
    assert hooks() == 0


def test_it_writes_what_peft_writes(tmp_path):
    """Each row with its own weights, over a cache."""
    backbone, base = (decoders.load(decoders.write(tmp_path)) for _ in range(2))
    theirs = peft.get_peft_model(base.model, peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=NAMES["causal_lm"]))
    case, task = Case("causal_lm", backbone, theirs.eval(), drawn(backbone, 2)), generation.build(generation.Config())
    asked = Batch(task, batch().items, None, None, LORA)
    (answer,) = QueryEngine(backbone).answer([Query(case.rows_KPD, asked, max_new_tokens=6, loss=along)])
    assert answer.texts_KB is not None
    assert len({text for texts in answer.texts_KB for text in texts}) > 2
    for rows_PD, texts in zip(case.rows_KPD, answer.texts_KB, strict=True):
        put(case, rows_PD)
        for (item,), text in zip(asked.items, texts, strict=True):
            ids = item.content[None]
            with torch.no_grad():
                written = theirs.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6,
                    pad_token_id=0,
                )  # fmt: skip
            assert backbone.tokenizer.decode(written[0, item.length :], skip_special_tokens=True) == text


def test_weights_of_another_model_and_a_backbone_without_places_are_refused(case):
    with pytest.raises(BackboneError, match="7 rows of 32 numbers are no LoRA weights"):
        case.backbone.adapters.rank(torch.zeros(7, 32))
    del case.backbone.adapters
    with pytest.raises(BackboneError, match="small has no LoRA"):
        lora.lora_of(case.backbone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "parameters"), [("minilm", (192, 384), 73728), ("smollm2", (800, 576), 460800)]
)
def test_the_numbers_of_the_real_backbones_are_those_of_peft(name, rows, parameters):
    backbone: Any = load_backbone(BackboneConfig(name=name, dtype="float32", attention="sdpa"), EngineConfig())[0]
    names = NAMES["sentence_encoder" if name == "minilm" else "causal_lm"]
    assert backbone.adapters.parameters(RANK) == parameters
    theirs = peft.get_peft_model(backbone.model, peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=names))
    assert theirs.get_nb_trainable_parameters()[0] == parameters
    assert tuple(backbone.adapters.start(RANK, 0).shape) == rows
