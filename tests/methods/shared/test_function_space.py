"""Function space: prompts that do the same have the same signature, the start none, and a head has no say."""

import pytest
import torch
from torch.nn import functional as F

import small
from ficpd.backbones.query_engine import QueryEngine
from ficpd.methods.shared.function_space import SIZE, FunctionSpaceEmbedding
from ficpd.types import Prompt


@pytest.fixture
def model():
    return QueryEngine(small.backbone())


def start(model: QueryEngine, head_rows: int = 0) -> Prompt:
    task = small.classes(tuned_head=bool(head_rows))
    return small.start(model, task)


def test_the_start_has_no_signature_and_others_have(model):
    begin = start(model)
    moved = begin.vectors_PD + torch.randn(begin.vectors_PD.shape, generator=torch.Generator().manual_seed(0))
    found = FunctionSpaceEmbedding(model, begin, 0).signatures(torch.stack([begin.vectors_PD, moved]))
    assert found.shape == (2, SIZE)
    assert found[0].abs().max() < 1e-5
    assert found[1].norm() > 0.1


def test_a_prompt_that_does_the_same_has_the_same_signature(model):
    """Virtual tokens in another order do the same to a bidirectional backbone without positions in the prompt."""
    begin = start(model)
    one = begin.vectors_PD + torch.randn(begin.vectors_PD.shape, generator=torch.Generator().manual_seed(1))
    other = begin.vectors_PD - (one - begin.vectors_PD)
    found = FunctionSpaceEmbedding(model, begin, 0).signatures(torch.stack([one, one.flip(0), other]))
    same, different = (float(F.cosine_similarity(found[0], f, dim=0)) for f in found[1:])
    assert F.cosine_similarity(one.flatten(), one.flip(0).flatten(), dim=0) < 0.9
    assert same > 0.999
    assert different < 0.9


def test_signatures_are_fixed_by_the_seed_and_near_in_length_to_the_movement(model):
    begin = start(model)
    moved = (begin.vectors_PD + 1.0)[None]
    first, again, another = (FunctionSpaceEmbedding(model, begin, seed).signatures(moved) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, another)


def test_head_rows_have_no_say(model):
    begin = start(model, head_rows=2)
    probes = FunctionSpaceEmbedding(model, begin, 0)
    head = begin.vectors_PD.clone()
    head[-2:] += 5.0
    assert probes.signatures(head[None]).abs().max() < 1e-5
