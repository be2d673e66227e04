"""Every backbone: rows never see each other, layers below are computed once, starts are real activations.

A new module of `backbones/` is found by itself; it needs one entry in `BUILDERS`: a small random model, no download.
What is read here are texts; a backbone that sees is shown an image made of each.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import sights
import small
from ficpd.backbones import causal_lm, masked_lm, sentence_encoder, seq2seq, tiny, vision
from ficpd.backbones.query_engine import QueryEngine
from ficpd.backbones.weights import Weights
from ficpd.errors import BackboneError
from ficpd.interfaces import Task
from ficpd.registry import names
from ficpd.tasks import classification
from ficpd.types import EncodedInput, Prompt, Query

WORDS = [*small.OTHER, *small.GOOD, *small.BAD, "is", "not", "very", ".", *(f"word{i}" for i in range(60))]
TEXTS = ["the film was good", "bad", "it was a dull story and we saw it twice", "we saw a fine film"]
WIDTH, TOKENS = 32, 4


def write_encoder(folder: Path, model: Any = BertModel) -> Path:
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=5 + len(WORDS), hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=48, initializer_range=0.3,
    )  # fmt: skip
    model(config).save_pretrained(folder)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: place for place, word in enumerate([*special, *WORDS])}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_causal_lm(folder: Path) -> Path:
    torch.manual_seed(3)
    special = ["<unk>", "<s>", "</s>", "\n"]
    config = LlamaConfig(
        vocab_size=len(special) + len(WORDS), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, bos_token_id=1,
        eos_token_id=2, pad_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: place for place, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.save_pretrained(folder)
    return folder


def write_seq2seq(folder: Path) -> Path:
    write_encoder(folder)  # for its tokenizer
    torch.manual_seed(4)
    config = BartConfig(
        vocab_size=5 + len(WORDS), d_model=WIDTH, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=48, init_std=0.3,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=3,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(folder)
    return folder


class Builder(NamedTuple):
    """`build(folder, dtype)`: a small one; `words(backbone)`: its table of word vectors; `led(ids)`: the tokens that
    stand before a start's own and are dropped."""

    generate_greedy: Callable[[Path], Path]
    build: Callable[..., Any]
    vocabulary: Callable[[Any], torch.Tensor] = lambda backbone: torch.zeros(0, backbone.width)
    led: Callable[[torch.Tensor], torch.Tensor] = lambda ids: ids[:0]


def loader(module: Any) -> Callable[..., Any]:
    def build(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        options = {"dtype": dtype, "attention": "eager", "device": small.CPU, "name": "small"}
        return module.build(module.Config(), Weights(folder, "ab" * 32, "here"), **options)

    return build


def embeddings(backbone: Any) -> torch.Tensor:
    return backbone.model.get_input_embeddings().weight


REMOTE = {"openai_api"}
"""They have no layers here, nor gradients: what they promise is in tests/backbones/test_endpoint.py."""
BUILDERS = {
    "tiny": Builder(lambda folder: folder, loader(tiny), lambda backbone: backbone.table),
    "sentence_encoder": Builder(write_encoder, loader(sentence_encoder), embeddings),
    "masked_lm": Builder(lambda folder: write_encoder(folder, BertForMaskedLM), loader(masked_lm), embeddings),
    "causal_lm": Builder(write_causal_lm, loader(causal_lm), embeddings, lambda ids: ids[-1:]),
    "seq2seq": Builder(write_seq2seq, loader(seq2seq), embeddings),
    "vision": Builder(sights.write_dinov2, loader(vision)),
    "vision (clip)": Builder(sights.write_clip, loader(vision)),
}


class Case(NamedTuple):
    kind: str
    folder: Path
    backbone: Any
    task: Task


def one_word_labels(**more: Any) -> Task:
    """One token each: a causal backbone scores them by its language head's rows."""
    return classification.build(classification.Config(labels={"good": "good", "bad": "bad"}, instruction="is", **more))


def two_word_labels() -> Task:
    """A causal backbone scores these by their likelihood: two sequences a record, of different lengths."""
    labels = {"good": "very good film", "bad": "not good"}
    return classification.build(classification.Config(labels=labels, instruction="it is"))


TASKS = {"words": one_word_labels, "phrases": two_word_labels, "head": lambda: one_word_labels(tuned_head=True)}


@pytest.fixture(scope="module", params=sorted({*names("backbones"), *BUILDERS} - REMOTE))
def kind(request, tmp_path_factory) -> tuple[str, Path, Any]:
    if request.param not in BUILDERS:
        pytest.fail(f"backbone {request.param!r} has no entry in BUILDERS of tests/contracts/test_backbone.py: add one")
    builder = BUILDERS[request.param]
    folder = builder.generate_greedy(tmp_path_factory.mktemp(request.param))
    return request.param, folder, builder.build(folder)


@pytest.fixture
def backbone(kind) -> Any:
    return kind[2]


@pytest.fixture
def reader(backbone) -> Any:
    if backbone.modality == "image":
        pytest.skip("it reads no texts")
    return backbone


@pytest.fixture(params=TASKS)
def case(request, kind) -> Case:
    if not kind[2].has_text_encoder and request.param != "head":
        pytest.skip("it knows no words: only a head can be tuned")
    return Case(*kind, TASKS[request.param]())


def layers(backbone: Any) -> list[int]:
    return list(range(backbone.depth))


def prompts(case: Case, rows: int, seed: int = 0, scale: float = 0.5) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, TOKENS + case.task.head_rows, case.backbone.width, generator=random)


def batch_of(case: Case, layer: int, texts: list[str] = TEXTS):
    records = [
        small.Record(f"row {i}", {"text": text, "image": sights.Seen(text), "target": ("good", "bad")[i % 2]})
        for i, text in enumerate(texts)
    ]
    empty = torch.zeros(TOKENS + case.task.head_rows, case.backbone.width)
    prompt = Prompt(empty, case.backbone.fingerprint, layer, case.task.head_rows)
    return case.task.encode(records, case.backbone, prompt)


def items_of(backbone: Any, texts: list[str] = TEXTS, room: int = TOKENS) -> list[EncodedInput]:
    if backbone.modality == "image":
        return [backbone.preprocess_image(sights.Seen(text), room) for text in texts]
    return [backbone.tokenize(text, None, "", None, room) for text in texts]


def outcome(ask: Callable[[], Any]) -> Any:
    """What is answered, or the refusal."""
    try:
        return ask()
    except BackboneError as error:
        return error


def test_a_new_backbone_needs_an_entry_here():
    covered = {name.partition(" ")[0] for name in BUILDERS}
    assert set(names("backbones")) == covered | REMOTE, "add the new backbone to BUILDERS: this contract covers it then"


def test_a_row_alone_answers_as_in_a_padded_batch(case):
    for layer in layers(case.backbone):
        batch, stacked = batch_of(case, layer), prompts(case, 2)
        assert len({item.length for items in batch.items for item in items}) > 2 or case.backbone.modality == "image"
        model = QueryEngine(case.backbone)
        together = model.answer([Query(stacked, batch, grad=True, outputs=True)])[0]
        for k in range(2):
            for b in range(len(batch)):
                query = Query(stacked[k : k + 1], batch.select([b]), grad=True, outputs=True)
                alone = QueryEngine(case.backbone).answer([query])[0]
                row = k * len(batch) + b
                assert small.close(alone.loss_KB[0, 0], together.loss_KB[k, b])
                assert small.close(alone.grad_KBPD[0, 0], together.grad_KBPD[k, b])
                for ours, theirs in zip(alone.outputs_KB.parts(), together.outputs_KB.parts(), strict=True):
                    assert (ours is None) == (theirs is None)
                    assert ours is None or small.close(ours[0], theirs[row])


def test_the_gradient_of_one_row_to_another_rows_prompt_is_zero(backbone):
    items = items_of(backbone)
    for layer in layers(backbone):
        random = torch.Generator().manual_seed(1)
        stacked = torch.randn(len(items), TOKENS, backbone.width, generator=random).requires_grad_()
        features = backbone.forward(stacked, backbone.encode_prefix(items, layer), items, layer).features_RD
        (features[1] * torch.arange(backbone.width)).sum().backward()
        assert stacked.grad[1].abs().max() > 1e-4
        assert stacked.grad[[0, 2, 3]].abs().max() == 0


def test_a_records_gradient_is_that_of_a_backward_of_its_own(case):
    for layer in layers(case.backbone):
        batch, stacked = batch_of(case, layer), prompts(case, 1)
        answered = QueryEngine(case.backbone).answer([Query(stacked, batch, grad=True)])[0].grad_KBPD
        tokens = stacked.shape[1] - case.task.head_rows
        for b in range(len(batch)):
            prompt, one = stacked[0].clone().requires_grad_(), batch.select([b])
            items = list(one.items[0])
            hidden = case.backbone.encode_prefix(items, layer)
            outputs = case.backbone.forward(prompt[:tokens].expand(len(items), -1, -1), hidden, items, layer)
            scores = None if outputs.scores_RN is None else outputs.scores_RN.T
            head = case.backbone.head_to_readout(prompt[None, tokens:]) if case.task.head_rows else None
            case.task.loss(type(outputs)(outputs.features_RD[:1], scores, head), one).sum().backward()
            assert small.close(answered[0, b], prompt.grad)
            assert prompt.grad.abs().max() > 0


def test_kept_lower_layers_answer_as_those_run_each_time(case):
    for layer in layers(case.backbone):
        batch = batch_of(case, layer)
        keeps, forgets = QueryEngine(case.backbone), QueryEngine(case.backbone, keep_bytes=0)
        for seed in range(2):
            query = Query(prompts(case, 1, seed), batch, grad=True)
            kept, fresh = keeps.answer([query])[0], forgets.answer([query])[0]
            assert small.close(kept.loss_KB, fresh.loss_KB)
            assert small.close(kept.grad_KBPD, fresh.grad_KBPD)
        # texts are embedded again, which is as cheap as a copy
        assert (keeps.kept.size > 0) == (layer > 0 or case.backbone.modality == "image")
        assert forgets.kept.size == 0


def test_layers_below_do_not_depend_on_company(backbone):
    items = items_of(backbone)
    for layer in layers(backbone):
        together = backbone.encode_prefix(items, layer)
        assert [state.shape for state in together] == [(item.length, backbone.width) for item in items]
        assert not any(state.requires_grad for state in together)
        for item, state in zip(items, together, strict=True):
            assert small.close(backbone.encode_prefix([item], layer)[0], state)


def test_without_a_prompt_the_layer_of_entry_changes_nothing(backbone):
    items = items_of(backbone)
    none = torch.zeros(len(items), 0, backbone.width)
    hidden = {layer: backbone.encode_prefix(items, layer) for layer in layers(backbone)}
    features = [backbone.forward(none, below, items, layer).features_RD for layer, below in hidden.items()]
    assert features[0].shape == (len(items), backbone.width)
    assert all(small.close(features[0], other) for other in features[1:])
    assert not small.close(features[0][0], features[0][1], 0.01)


def test_a_prompt_changes_what_the_backbone_says_at_every_layer(backbone):
    items = items_of(backbone)
    for layer in layers(backbone):
        hidden = backbone.encode_prefix(items, layer)
        stacked = backbone.init_prompt("very good film", TOKENS, layer, 0).expand(len(items), -1, -1)
        said = backbone.forward(stacked, hidden, items, layer).features_RD
        assert not small.close(said, backbone.forward(stacked[:, :0], hidden, items, layer).features_RD, 1e-3)


def test_an_all_zero_prompt_has_finite_gradients(case):
    for layer in layers(case.backbone):
        query = Query(prompts(case, 1, scale=0.0), batch_of(case, layer), grad=True)
        answer = QueryEngine(case.backbone).answer([query])[0]
        assert torch.isfinite(answer.loss_KB).all()
        assert torch.isfinite(answer.grad_KBPD).all()
        assert answer.grad_KBPD.abs().max() > 0


def test_answers_are_float32_whatever_the_backbone_computes_in(kind):
    name, folder, _ = kind
    built = BUILDERS[name].build(folder, torch.bfloat16)
    case = Case(name, folder, built, one_word_labels(tuned_head=not built.has_text_encoder))
    query = Query(prompts(case, 1), batch_of(case, 0), grad=True, outputs=True)
    answer = QueryEngine(case.backbone).answer([query])[0]
    dtypes = {answer.loss_KB.dtype, answer.grad_KBPD.dtype, answer.outputs_KB.features_RD.dtype}
    assert dtypes == {torch.float32}
    assert case.backbone.init_prompt("good", 2, 0, 0).dtype == torch.float32


@pytest.mark.parametrize("text", ["the film was good", None])
def test_a_start_is_the_activations_of_words(kind, text):
    """At layer 0 each vector is a word's own; further up it is what the layers below make of those very words."""
    name, _, backbone = kind
    if backbone.modality == "image":
        check_a_start_of_patches(backbone, text)
        return
    table = BUILDERS[name].vocabulary(backbone).float()
    bottom = backbone.init_prompt(text, TOKENS, 0, 7)
    distances = (bottom[:, None] - table).abs().amax(-1)
    assert distances.min(1).values.max() < 1e-5
    ids = distances.argmin(1)
    assert len(set(ids.tolist())) == TOKENS
    for layer in layers(backbone):
        vectors = backbone.init_prompt(text, TOKENS, layer, 7)
        assert (vectors.shape, vectors.dtype, vectors.device) == ((TOKENS, backbone.width), torch.float32, small.CPU)
        whole = torch.cat([BUILDERS[name].led(ids), ids])
        assert small.close(vectors, backbone.encode_prefix([EncodedInput(whole, len(whole))], layer)[0][-TOKENS:])


def check_a_start_of_patches(backbone: Any, text: str | None) -> None:
    """At every layer each vector is one and the same patch of a made-up image, as it is there; no class token is."""
    items = [backbone.preprocess_image(image, TOKENS) for image in backbone.synthetic_inputs(8, 7)]
    hidden = [backbone.encode_prefix(items, layer) for layer in layers(backbone)]
    patches = [torch.cat([state[1:] for state in states]).float() for states in hidden]
    distances = (backbone.init_prompt(text, TOKENS, 0, 7)[:, None] - patches[0]).abs().amax(-1)
    ids = distances.argmin(1)
    assert len(set(ids.tolist())) == TOKENS
    for layer in layers(backbone):
        vectors = backbone.init_prompt(text, TOKENS, layer, 7)
        assert (vectors.shape, vectors.dtype, vectors.device) == ((TOKENS, backbone.width), torch.float32, small.CPU)
        assert small.close(vectors, patches[layer][ids])


def test_a_start_comes_from_its_text_or_seed_alone(backbone):
    for layer in layers(backbone):
        text = backbone.init_prompt("the film was good", TOKENS, layer, 0)
        if backbone.modality == "image":  # a text says nothing to it
            assert torch.equal(text, backbone.init_prompt(None, TOKENS, layer, 0))
        else:
            assert torch.equal(text, backbone.init_prompt("the film was good", TOKENS, layer, 1))
            assert not small.close(text, backbone.init_prompt("we saw it twice", TOKENS, layer, 0), 0.01)
        drawn = backbone.init_prompt(None, TOKENS, layer, 0)
        assert torch.equal(drawn, backbone.init_prompt(None, TOKENS, layer, 0))
        assert not small.close(drawn, backbone.init_prompt(None, TOKENS, layer, 1), 0.01)


def test_a_start_longer_than_its_text_goes_through_it_again(backbone):
    for layer in layers(backbone):
        vectors = backbone.init_prompt("good film", 5, layer, 0)
        assert vectors.shape == (5, backbone.width)
        assert torch.isfinite(vectors).all()


@pytest.mark.parametrize("text", ["good film", None])
def test_a_start_longer_than_the_backbone_reads_is_made_or_refused(backbone, text):
    for layer in layers(backbone):
        for wanted in (backbone.max_tokens + 10, 200):
            vectors = outcome(lambda layer=layer, wanted=wanted: backbone.init_prompt(text, wanted, layer, 0))
            assert isinstance(vectors, BackboneError) or vectors.shape == (wanted, backbone.width)


def test_the_same_weights_have_the_same_fingerprint_and_say_the_same(kind):
    name, folder, backbone = kind
    again = BUILDERS[name].build(folder)
    assert again.fingerprint == backbone.fingerprint
    items = items_of(backbone)
    none = torch.zeros(len(items), 0, backbone.width)
    said = [one.forward(none, one.encode_prefix(items, 0), items, 0).features_RD for one in (backbone, again)]
    assert torch.equal(*said)


def test_it_leaves_the_global_random_state_alone(kind):
    name, folder, _ = kind
    before = torch.random.get_rng_state()
    backbone = BUILDERS[name].build(folder)
    backbone.init_prompt(None, TOKENS, backbone.depth - 1, 0)
    items = items_of(backbone)
    backbone.forward(torch.zeros(len(items), 2, backbone.width), backbone.encode_prefix(items, 0), items, 0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_long_text_is_cut_so_that_the_prompt_fits(reader):
    for pair in (None, "bad story " * 200):
        item = reader.tokenize("the film was good " * 200, pair, "", None, TOKENS)
        assert item.length == len(item.content) <= reader.max_tokens - TOKENS
        answered = reader.forward(torch.zeros(1, TOKENS, reader.width), reader.encode_prefix([item], 0), [item], 0)
        assert torch.isfinite(answered.features_RD).all()


def test_the_share_of_a_text_that_is_unknown_is_told(kind):
    name, _, backbone = kind
    assert backbone.unk_rate([]) == backbone.unk_rate(TEXTS) == 0.0
    told = backbone.unk_rate(["the film ภาพยนตร์", "was ፊልም"])
    assert told == (0.0 if name == "tiny" or backbone.modality == "image" else 0.4)


def test_images_are_looked_at_and_texts_read_never_the_other(backbone):
    image = outcome(lambda: backbone.preprocess_image(sights.Seen("a"), 0))
    text = outcome(lambda: backbone.tokenize("a", None, "", None, 0))
    assert isinstance(text if backbone.modality == "image" else image, BackboneError)
    assert isinstance(image if backbone.modality == "image" else text, EncodedInput)


def test_a_pair_is_read(reader):
    one, other = (reader.tokenize("the film", pair, "", None, TOKENS) for pair in ("was good", "was bad"))
    assert one.length > reader.tokenize("the film", None, "", None, TOKENS).length
    assert one.content.tolist() != other.content.tolist()


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_a_text_without_words_is_read_or_refused(reader, text):
    item = outcome(lambda: reader.tokenize(text, None, "", None, TOKENS))
    if isinstance(item, BackboneError):
        assert "empty" in str(item)
        return
    answered = reader.forward(torch.ones(1, TOKENS, reader.width), reader.encode_prefix([item], 0), [item], 0)
    assert torch.isfinite(answered.features_RD).all()


@pytest.mark.parametrize("more", [0, 1, 1000])
def test_a_prompt_that_leaves_no_room_is_refused(backbone, more):
    with pytest.raises(BackboneError, match="virtual tokens"):
        items_of(backbone, room=backbone.max_tokens + more)


@pytest.mark.parametrize("answer", ["", "  ", "\t"])
def test_an_answer_without_tokens_is_refused(backbone, answer):
    with pytest.raises(BackboneError, match="has no tokens" if backbone.has_text_encoder else "task.tuned_head"):
        backbone.readout("is", ["good", answer])


def test_a_backbone_writes_or_says_that_it_cannot(backbone):
    prompt = Prompt(backbone.init_prompt("good", TOKENS, 0, 0), backbone.fingerprint)
    written = outcome(lambda: backbone.generate(prompt, TEXTS, 3))
    drawn = outcome(lambda: backbone.generate(prompt, TEXTS, 3, temperature=1.0, seed=1))
    read = outcome(lambda: [backbone.tokenize(text, None, "", "good", TOKENS, writes=3) for text in TEXTS])
    items = items_of(backbone)
    after = outcome(lambda: backbone.generate_greedy(prompt.vectors_PD.expand(len(items), -1, -1), items, 0, 3))
    if isinstance(written, BackboneError):
        assert all("cannot write" in str(refusal) for refusal in (written, drawn, read, after))
    else:
        assert [type(text) for text in [*written, *drawn, *after]] == [str] * 3 * len(TEXTS)
        assert after == written
        assert [item.scored > 0 for item in read] == [True] * len(TEXTS)


def test_nonsense_is_as_many_texts_as_asked_for_and_always_the_same(backbone):
    texts = backbone.synthetic_inputs(20, 3)
    assert len(texts) == 20
    image = backbone.modality == "image"
    said = [(text.open().mode, text.open().tobytes()) if image else text.strip() for text in texts]
    assert all(said)
    assert len(set(said)) > 15
    assert backbone.synthetic_inputs(20, 3) == texts != backbone.synthetic_inputs(20, 4)
