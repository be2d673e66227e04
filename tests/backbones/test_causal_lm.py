"""Decoders of the Llama family, on a small random one; the slow tests at the end read and write with SmolLM2."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from decoders import CPU, FAMILY, SIZES, WORDS, load, write
from ficpd.backbones import catalog, causal_lm, decoding, weights
from ficpd.backbones.causal_lm import CausalLM, Config
from ficpd.errors import BackboneError
from ficpd.types import EncodedInput, Prompt

TEXTS = ["the film was very good", "bad", "the story was long and dull but not bad"]
ASK = "the sentiment is"


@pytest.fixture(scope="module")
def small(llama) -> CausalLM:
    return load(llama)


def prompts(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(seed))


def read(backbone: CausalLM, texts=TEXTS, answer=None, room: int = 5):
    return [backbone.tokenize(text, None, ASK, answer, room) for text in texts]


def ask(backbone: CausalLM, prompts_SPD, items, layer: int = 0) -> Any:
    return backbone.forward(prompts_SPD, backbone.encode_prefix(items, layer), items, layer)


def words(backbone: CausalLM, item) -> str:
    return " ".join(backbone.tokenizer.convert_ids_to_tokens(item.content.tolist()))


def test_a_text_is_read_with_its_pair_instruction_and_answer(small):
    item = small.tokenize("the film", "was long", ASK, "very good", room=0)
    assert words(small, item) == "the film \n was long \n the sentiment is very good"
    assert (item.length, item.scored, item.content.dtype) == (11, 2, torch.int64)
    assert words(small, small.tokenize("the film", None, "", None, room=0)) == "the film"


def test_only_texts_are_cut(llama):
    backbone = load(llama, max_tokens=16)
    item = backbone.tokenize("the film " * 30, None, ASK, "very good", room=5)
    assert words(backbone, item) == "the film the film the \n the sentiment is very good"
    item = backbone.tokenize("the film " * 30, "bad " * 30, ASK, None, room=2)
    assert words(backbone, item) == "the film the film the \n bad bad bad bad \n the sentiment is"
    item = backbone.tokenize("the", "bad " * 30, ASK, None, room=6)
    assert words(backbone, item) == "the \n bad bad bad bad \n the sentiment is"
    assert load(llama, max_tokens=1000).max_tokens == SIZES["max_position_embeddings"]


def test_the_first_token_is_set_where_the_tokeniser_sets_it(tmp_path):
    backbone = load(write(tmp_path, begins=True), max_tokens=8)
    only = words(backbone, backbone.tokenize("the film " * 9, None, ASK, None, room=1))
    assert only == "<s> the film \n the sentiment is"


def test_a_tokeniser_that_begins_every_string_with_a_blank_does_so_once(tmp_path):
    vocabulary = {"<unk>": 0, "▁a": 1, "▁film": 2, "▁good": 3, "▁": 4}
    pieces = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backbone = load(write(tmp_path))
    backbone.tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>")
    rows = backbone.readout("", ["good", "film"])
    assert rows is not None
    assert torch.equal(rows, backbone.model.lm_head.weight[[3, 2]])


def test_a_prompt_longer_than_the_context_is_an_error(llama):
    with pytest.raises(BackboneError, match="longer than the context"):
        load(llama, max_tokens=16).tokenize("the film", None, ASK, None, room=12)


def test_blank_answers_and_nothing_to_read_are_errors(small):
    with pytest.raises(BackboneError, match="' '"):
        small.tokenize("the film", None, ASK, " ", room=0)
    with pytest.raises(BackboneError, match="''"):
        small.readout(ASK, ["good", ""])
    with pytest.raises(BackboneError, match="nothing to read"):
        small.tokenize("", None, "", None, room=0)


def test_readout_is_the_language_heads_rows_of_distinct_single_tokens(small):
    rows = small.readout(ASK, ["positive", "negative"])
    assert rows is not None
    ids = small.tokenizer.convert_tokens_to_ids(["positive", "negative"])
    assert torch.equal(rows, small.model.lm_head.weight[ids])
    assert small.readout(ASK, ["positive", "very good"]) is None
    assert small.readout(ASK, ["positive", "positive"]) is None
    lengths = small.head_to_readout(rows * 7).norm(dim=-1)
    torch.testing.assert_close(lengths, lengths[:1].expand(len(rows)))
    cosine = torch.nn.functional.cosine_similarity(small.head_to_readout(rows * 7), rows, dim=-1)
    torch.testing.assert_close(cosine, torch.ones(len(rows)))


def test_an_answer_to_be_written_ends_with_the_end_token_and_keeps_its_room(llama):
    backbone = load(llama, max_tokens=16)
    item = backbone.tokenize("the film " * 30, None, ASK, "good", room=3, writes=5)
    assert words(backbone, item) == "the film the film \n the sentiment is good </s>"
    assert (item.length, item.scored) == (10, 2)
    bare = backbone.tokenize("the film " * 30, None, ASK, None, room=3, writes=5)
    assert words(backbone, bare) == "the film the film \n the sentiment is"
    cut = backbone.tokenize("bad", None, ASK, "the film was very long", room=3, writes=2)
    assert (words(backbone, cut), cut.scored) == ("bad \n the sentiment is the film", 2)
    with pytest.raises(BackboneError, match="9 of the answer leave nothing"):
        backbone.tokenize("bad", None, ASK, None, room=3, writes=9)


@pytest.mark.parametrize("family", FAMILY)
def test_at_layer_zero_it_is_the_plain_model(tmp_path, family):
    backbone = load(write(tmp_path, family))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    items, prompts_SPD = read(backbone), prompts(3, 5)
    features = ask(backbone, prompts_SPD, items).features_RD
    for item, prompt, feature in zip(items, prompts_SPD, features, strict=True):
        whole = torch.cat([prompt, plain.get_input_embeddings()(item.content)])[None]
        expected = plain.model(inputs_embeds=whole).last_hidden_state[0, -1]
        torch.testing.assert_close(feature, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", [1, 2])
def test_at_a_later_layer_the_text_went_alone_through_the_layers_below(llama, small, layer):
    items, prompts_SPD = read(small), prompts(3, 5)
    plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    features = ask(small, prompts_SPD, items, layer).features_RD
    for item, prompt, feature in zip(items, prompts_SPD, features, strict=True):
        states = plain(item.content[None], output_hidden_states=True).hidden_states[layer]
        states = torch.cat([prompt[None], states], dim=1)
        places = torch.arange(states.shape[1])[None]
        bias = torch.full((1, 1, len(places[0]), len(places[0])), -1e9).triu(1)
        for block in plain.model.layers[layer:]:
            rotations = plain.model.rotary_emb(states, places)
            states = block(states, attention_mask=bias, position_ids=places, position_embeddings=rotations)
        torch.testing.assert_close(feature, plain.model.norm(states)[0, -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("length", [0, 5])
def test_rows_never_see_each_other(llama, attention, layer, length):
    backbone = load(llama, attention)
    items = [*read(backbone), *read(backbone, answer="very good"), *read(backbone, answer="bad")]
    prompts_SPD = prompts(len(items), length).requires_grad_()
    together = ask(backbone, prompts_SPD, items, layer)
    for row, item in enumerate(items):
        alone = ask(backbone, prompts_SPD[row : row + 1], [item], layer)
        torch.testing.assert_close(together.features_RD[row], alone.features_RD[0], atol=1e-5, rtol=1e-5)
        if item.scored:
            torch.testing.assert_close(together.scores_RN[row], alone.scores_RN[0], atol=1e-5, rtol=1e-5)
    if length:
        (grad,) = torch.autograd.grad(together.features_RD[1].sum() + together.scores_RN[4].sum(), prompts_SPD)
        assert [bool(g.abs().sum()) for g in grad] == [row in (1, 4) for row in range(len(items))]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_all_zero_prompt_has_finite_gradients(llama, attention):
    backbone = load(llama, attention)
    items = read(backbone, answer="very good")
    zero = torch.zeros(3, 5, 32, requires_grad=True)
    outputs = ask(backbone, zero, items)
    (grad,) = torch.autograd.grad(outputs.features_RD.sum() + outputs.scores_RN.sum(), zero)
    assert grad.isfinite().all()
    assert grad.abs().sum() > 0


def test_scores_are_the_mean_log_likelihood_of_the_answers_tokens(llama, small):
    plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    items, prompts_SPD = [*read(small, answer="not very good"), *read(small)], prompts(6, 4)
    scores = ask(small, prompts_SPD, items).scores_RN
    assert scores.shape == (6, 1)
    for item, prompt, score in zip(items[:3], prompts_SPD, scores[:, 0], strict=False):
        whole = torch.cat([prompt, plain.get_input_embeddings()(item.content)])[None]
        said = plain(inputs_embeds=whole).logits[0].log_softmax(-1)[-4:-1]
        expected = said.gather(1, item.content[-3:, None]).mean()
        torch.testing.assert_close(score, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(scores[3:, 0], torch.full((3,), -torch.inf))
    assert ask(small, prompts_SPD[:3], items[3:]).scores_RN is None


def test_below_keeps_nothing_of_the_padded_batch(small):
    items = read(small)
    for layer in (1, 2):  # layer 0 is never kept
        for item, states in zip(items, small.encode_prefix(items, layer), strict=True):
            assert states.shape == (item.length, 32)
            assert states.untyped_storage().nbytes() == states.numel() * 4
            assert not states.requires_grad


def test_a_layer_that_does_not_exist_is_an_error(small):
    with pytest.raises(BackboneError, match="expected 0 to 2"):
        small.encode_prefix(read(small), 3)


def test_a_start_is_made_of_real_activations(small):
    from_text = small.init_prompt("very good film", 5, 1, seed=0)
    ids = small.tokenizer("very good film very good")["input_ids"]
    led = [*(small._first or ids[-1:]), *ids]
    expected = small.model(torch.tensor([led]), output_hidden_states=True).hidden_states[1][0][-5:]
    torch.testing.assert_close(from_text, expected, atol=1e-5, rtol=1e-5)
    drawn = small.init_prompt(None, 6, 0, seed=1)
    ordinary = small.model.get_input_embeddings().weight[3:]
    assert all((ordinary == row).all(1).any() for row in drawn)
    assert torch.equal(drawn, small.init_prompt(None, 6, 0, seed=1))
    assert not torch.equal(drawn, small.init_prompt(None, 6, 0, seed=2))
    assert small.init_prompt(None, 40, 2, seed=1).shape == (40, 32)
    with pytest.raises(BackboneError, match="start text ''"):
        small.init_prompt("", 5, 0, seed=0)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_generation_is_greedy_and_ends_at_the_end_token(small, layer):
    prompt = Prompt(prompts(1, 4)[0], small.fingerprint, layer)
    texts = [f"{text} {word}" for text in TEXTS for word in WORDS[:4]]
    written = small.generate(prompt, texts, 6)
    lengths = []
    for text, said in zip(texts, written, strict=True):
        ids, expected = small.tokenizer(text)["input_ids"], []
        for _ in range(6):
            item = EncodedInput(torch.tensor(ids + expected), len(ids + expected))
            feature = ask(small, prompt.vectors_PD[None], [item], layer).features_RD
            expected.append(int(small.model.lm_head(feature).argmax()))
            if expected[-1] == 2:
                break
        lengths.append(len(expected))
        assert said == small.tokenizer.decode(expected, skip_special_tokens=True)
    assert len(set(lengths)) > 1, "some should end early and some not"


def test_generation_keeps_the_end_of_a_long_text_and_drops_the_head_rows(llama, small):
    short, vectors = load(llama, max_tokens=8), prompts(1, 4)[0]
    prompt = Prompt(vectors[:3], small.fingerprint)
    tuned_head = Prompt(vectors, small.fingerprint, head_rows=1)
    said = small.generate(prompt, ["the film was very good"], 3)
    assert short.generate(prompt, ["bad and long the film was very good"], 3) == said
    assert small.generate(tuned_head, ["the film was very good"], 3) == said
    assert small.generate(prompt, [], 3) == []
    assert small.generate(prompt, ["bad"], 0) == [""]
    with pytest.raises(BackboneError, match="longer than the context"):
        short.generate(Prompt(prompts(1, 8)[0], small.fingerprint), ["bad"], 3)


def test_generation_wants_a_prompt_of_this_backbone(small):
    with pytest.raises(BackboneError, match="encoder:1234"):
        small.generate(Prompt(prompts(1, 4)[0], "encoder:1234"), ["bad"], 3)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("length", [0, 4])
def test_each_row_is_written_behind_its_own_prompt_and_before_its_scored_tail(small, layer, length):
    items = [*read(small), *read(small, answer="very good"), *read(small, answer="not bad")]
    prompts_SPD = prompts(len(items), length)
    written = small.generate_greedy(prompts_SPD, items, layer, 6)
    for row, said in enumerate(written):
        item = EncodedInput(items[row % 3].content, items[row % 3].length)
        assert small.generate_greedy(prompts_SPD[row : row + 1], [item], layer, 6) == [said]
        text = f"{TEXTS[row % 3]}\n{ASK}"
        assert small.generate(Prompt(prompts_SPD[row], small.fingerprint, layer), [text], 6) == [said]
    assert (len(set(written)) > 3) == (length > 0)
    assert small.generate_greedy(prompts(0, length), [], layer, 6) == []
    assert small.generate_greedy(prompts_SPD[:2], items[:2], layer, 0) == ["", ""]


def test_what_does_not_fit_is_not_written(llama, small):
    items = read(small)
    longest = max(item.length for item in items)
    room = SIZES["max_position_embeddings"] - longest - 4
    assert len(small.generate_greedy(prompts(3, 4), items, 0, room)) == 3
    with pytest.raises(BackboneError, match=f"4 virtual tokens, {longest} read and {room + 1} to write"):
        small.generate_greedy(prompts(3, 4), items, 0, room + 1)
    with pytest.raises(BackboneError, match="expected 0 to 2"):
        small.generate_greedy(prompts(3, 4), items, 3, 1)
    for asked in (
        lambda: small.generate_greedy(prompts(3, 4), items, 0, -1),
        lambda: generate(small, ["bad"], max_tokens=-1),
    ):
        with pytest.raises(BackboneError, match="max_tokens = -1: expected 0 or more"):
            asked()


def generate(backbone: CausalLM, texts: list[str], layer: int = 0, max_tokens: int = 8, **how) -> list[str]:
    return backbone.generate(Prompt(prompts(1, 4)[0], backbone.fingerprint, layer), texts, max_tokens, **how)


@pytest.mark.parametrize("layer", [0, 2])
def test_drawn_texts_come_from_the_seed_and_their_own_text_alone(small, layer):
    texts = [f"{text} {word}" for text in TEXTS for word in WORDS[:7]]
    drawn = generate(small, texts, layer, temperature=1.5, seed=1)
    assert drawn == generate(small, texts, layer, temperature=1.5, seed=1)
    assert drawn[::-1] == generate(small, texts[::-1], layer, temperature=1.5, seed=1)
    assert [drawn[5]] == generate(small, texts[5:6], layer, temperature=1.5, seed=1)
    assert drawn != generate(small, texts, layer, temperature=1.5, seed=2)
    assert drawn != generate(small, texts, layer)
    assert generate(small, texts, layer, temperature=1e-4, seed=3) == generate(small, texts, layer)


def test_equal_texts_are_drawn_differently(small):
    drawn = generate(small, ["the film was"] * 20, temperature=2.0)
    assert len(set(drawn)) > 10
    assert drawn[:3] == generate(small, ["the film was"] * 3, temperature=2.0)


@pytest.mark.parametrize("temperature", [-0.1, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_an_error(small, temperature):
    with pytest.raises(BackboneError, match=r"temperature = .*: expected 0"):
        generate(small, ["bad"], temperature=temperature)


def test_tokens_are_drawn_as_often_as_they_are_likely_and_never_from_the_tail():
    probability = torch.tensor([0.03, 0.5, 0.2, 0.25, 0.02])
    uniform = torch.arange(10_000) / 10_000
    ids = decoding.nucleus_sample(probability.log().expand(10_000, -1), uniform)
    found = ids.bincount(minlength=5) / 10_000
    torch.testing.assert_close(found, torch.tensor([0, 0.5, 0.2, 0.25, 0]) / 0.95, atol=1e-3, rtol=0)
    sure = torch.tensor([[0.0, 200.0, 0.0]]).expand(2, -1)
    assert decoding.nucleus_sample(sure, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 1]
    streams = decoding.row_generators(["a", "b", "a"], 7)
    draw = decoding.sampler(streams, 0.5)(probability.log().expand(3, -1))
    assert draw.shape == (3,)
    again = [torch.rand((), generator=stream) for stream in decoding.row_generators(["a", "b", "a"], 7)]
    expected = decoding.nucleus_sample((2 * probability.log()).expand(3, -1), torch.stack(again))
    assert torch.equal(draw, expected)
    assert len({float(value) for value in again}) == 3


def test_what_cannot_be_run_is_named(llama, tmp_path):
    with pytest.raises(BackboneError, match="cannot be read"):
        load(tmp_path)
    write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(BackboneError, match="cannot be read"):
        load(tmp_path)


@pytest.fixture(scope="module")
def smollm2() -> CausalLM:
    found = weights.resolve(catalog.NAMED["smollm2"].weights)
    return causal_lm.build(Config(), found, dtype=torch.float32, attention="eager", device=CPU, name="smollm2")


OBVIOUS = {
    "I loved this film, it is wonderful.": 1,
    "What a terrible, boring mess.": 0,
    "The food was delicious and the staff were kind.": 1,
    "The worst purchase I have ever made.": 0,
    "An excellent phone, I am very happy with it.": 1,
    "It broke after one day and they refused to refund me.": 0,
    "A beautiful and moving story with great actors.": 1,
    "I hate this place, it is dirty and loud.": 0,
    "Fantastic service, I will come again!": 1,
    "A sad waste of money and time.": 0,
}


@pytest.mark.slow
def test_smollm2_tells_obvious_polarity_with_no_prompt(smollm2):
    ask_it, none = "The sentiment of this sentence is", torch.zeros(10, 0, smollm2.width)
    items = [smollm2.tokenize(text, None, ask_it, None, 0) for text in OBVIOUS]
    features = ask(smollm2, none, items).features_RD
    readout = smollm2.readout(ask_it, ["negative", "positive"])
    assert readout is not None
    by_head = (features @ readout.T).argmax(1)
    pairs = [[smollm2.tokenize(t, None, ask_it, a, 0) for t in OBVIOUS] for a in ("negative", "positive")]
    by_likelihood = torch.cat([ask(smollm2, none, items).scores_RN for items in pairs], dim=1).argmax(1)
    assert torch.equal(by_head, by_likelihood)
    assert sum(int(p) == t for p, t in zip(by_head, OBVIOUS.values(), strict=True)) >= 7


@pytest.mark.slow
def test_smollm2_goes_on_with_a_sentence(smollm2):
    nothing = Prompt(torch.zeros(0, smollm2.width), smollm2.fingerprint)
    said = smollm2.generate(nothing, ["The capital of France is", "One, two, three, four,"], 8)
    assert "Paris" in said[0]
    assert "five" in said[1]
    start = Prompt(smollm2.init_prompt("A short text about cities.", 6, 0, 0), smollm2.fingerprint, 0)
    assert "Paris" in smollm2.generate(start, ["The capital of France is"], 8)[0]
