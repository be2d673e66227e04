"""Small random models of the families in docs/backbones.md, and how far a backbone is from plain transformers and PEFT.

The references use no code of the package: prompts in front of `inputs_embeds`, or PEFT, one row at a time; for a middle
layer, hooks that put a prompt before the states of a block.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import peft
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ficpd.backbones import causal_lm, masked_lm, sentence_encoder, seq2seq, vision
from ficpd.errors import BackboneError
from ficpd.types import EncodedInput, Prompt

WORDS = ["a", "the", "film", "was", "very", "good", "bad", "and", "long", "not", "dull", "story", "but", "fine", "\n"]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
TEXTS = ["the film was very good", "bad", "the story was long and dull but not bad and very fine"]
VOCABULARY, WIDTH, LAYERS, TOKENS = 40, 32, 4, 3
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
GROUPED = {**BASE, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
CAPPED = {**GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 6, "final_logit_softcapping": 3.0}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64,
        "initializer_range": 0.3, "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip
BART = {"vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "max_position_embeddings": 64, "init_std": 0.3, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
        "decoder_start_token_id": 3, "forced_eos_token_id": 3}  # fmt: skip
T5 = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_decoder_layers": 2,
      "num_heads": 4, "initializer_factor": 1.0, "pad_token_id": 0, "eos_token_id": 3,
      "decoder_start_token_id": 0}  # fmt: skip
DEBERTA = {**BASE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16,
           "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False,
           "type_vocab_size": 0}  # fmt: skip
DISTILBERT = {"vocab_size": VOCABULARY, "dim": WIDTH, "hidden_dim": 48, "n_layers": LAYERS, "n_heads": 4,
              "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0}  # fmt: skip


class Family(NamedTuple):
    """`model` and `config`: class names in transformers."""

    kind: str
    model: str
    config: str
    sizes: dict[str, Any]


def _decoder(name: str, sizes: dict[str, Any], model: str = "", config: str = "") -> Family:
    return Family("causal_lm", model or f"{name}ForCausalLM", config or f"{name}Config", sizes)


DECODERS = {
    "Llama": _decoder("Llama", GROUPED),
    "Llama 3.2 (llama3 rope, tied)": _decoder("Llama", {**GROUPED, "tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}}),
    "Qwen2": _decoder("Qwen2", {**GROUPED, "tie_word_embeddings": True}),
    "Qwen3": _decoder("Qwen3", GROUPED),
    "Mistral (window 6)": _decoder("Mistral", {**GROUPED, "sliding_window": 6}),
    "Gemma 2 (caps)": _decoder("Gemma2", CAPPED),
    "Gemma 3": _decoder("Gemma3", {**CAPPED, "final_logit_softcapping": None}, config="Gemma3TextConfig"),
    "Phi-3, Phi-4": _decoder("Phi3", GROUPED),
    "GPT-2": _decoder("GPT2", GPT2, model="GPT2LMHeadModel"),
    "GPT-NeoX, Pythia": _decoder("GPTNeoX", BASE),
    "OPT": _decoder("OPT", {**BASE, "ffn_dim": 48, "word_embed_proj_dim": WIDTH, "init_std": 0.3}),
    "BLOOM": _decoder("Bloom", {**BASE, "n_layer": LAYERS, "n_head": 4}),
    "Falcon": _decoder("Falcon", BASE),
    "StableLM": _decoder("StableLm", GROUPED),
    "OLMo 2": _decoder("Olmo2", GROUPED),
    "Granite": _decoder("Granite", {**GROUPED, "embedding_multiplier": 12.0, "logits_scaling": 8.0,
                                    "residual_multiplier": 0.2, "attention_multiplier": 0.1}),
    "SmolLM3": _decoder("SmolLM3", GROUPED),
    "Mixtral": _decoder("Mixtral", {**GROUPED, "num_local_experts": 4}),
    "Qwen2-MoE": _decoder("Qwen2Moe", {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 16,
                                       "decoder_sparse_step": 1}),
    "Qwen3-MoE": _decoder("Qwen3Moe", {**GROUPED, **EXPERTS}),
    "Mamba": _decoder("Mamba", {**BASE, "state_size": 4}),
}  # fmt: skip
ENCODERS = {
    "BERT": ("Bert", BASE), "RoBERTa": ("Roberta", BASE), "XLM-R": ("XLMRoberta", BASE),
    "CamemBERT": ("Camembert", BASE), "DistilBERT": ("DistilBert", DISTILBERT), "MPNet": ("MPNet", BASE),
    "ELECTRA": ("Electra", {**BASE, "embedding_size": WIDTH}), "DeBERTa-v3": ("DebertaV2", DEBERTA),
    "ModernBERT": ("ModernBert", {**BASE, "local_attention": 8, "cls_token_id": 2, "sep_token_id": 3}),
    "ALBERT": ("Albert", {**BASE, "embedding_size": 16}), "Data2Vec": ("Data2VecText", BASE),
    "RoBERTa-PreLayerNorm": ("RobertaPreLayerNorm", BASE), "XLM-R-XL": ("XLMRobertaXL", BASE),
}  # fmt: skip
MASKED = {name: Family("masked_lm", f"{n}ForMaskedLM", f"{n}Config", sizes) for name, (n, sizes) in ENCODERS.items()}
SENTENCES = {
    name: Family("sentence_encoder", f"{n}Model", f"{n}Config", sizes) for name, (n, sizes) in ENCODERS.items()
}
SEQ2SEQ = {
    "T5": Family("seq2seq", "T5ForConditionalGeneration", "T5Config", T5),
    "BART": Family("seq2seq", "BartForConditionalGeneration", "BartConfig", BART),
}
CLASSES = {
    "causal_lm": (causal_lm.CausalLM, causal_lm.Config), "masked_lm": (masked_lm.MaskedLM, masked_lm.Config),
    "sentence_encoder": (sentence_encoder.Encoder, sentence_encoder.Config), "seq2seq": (seq2seq.Seq2Seq, seq2seq.Config),
}  # fmt: skip


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Whole words. Encoders have a token at the beginning and at the end, T5 and BART one at the end."""
    vocabulary = {word: place for place, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    ends = {"causal_lm": "$A", "seq2seq": "$A </s>"}.get(kind, "<s> $A </s>")
    tokens = [("<s>", 2), ("</s>", 3)]
    words.post_processor = processors.TemplateProcessing(single=ends, pair="<s> $A </s> $B </s>", special_tokens=tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>", cls_token="<s>",
        sep_token="</s>", mask_token="<mask>",
    )  # fmt: skip


def build(family: Family, **more: Any) -> Any:
    """A random model whose every bias and norm is drawn, so that a forgotten one shows."""
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**{**family.sizes, **more})
    model = getattr(transformers, family.model)(config).eval()
    for weight in model.parameters():
        if weight.dim() == 1 or not weight.any():
            weight.data += 0.1 * torch.randn_like(weight)
    return model


def load(family: Family, **more: Any) -> Any:
    if family.kind == "vision":
        return load_vision(family, build(family, **more))
    made, config = CLASSES[family.kind]
    return made(config(), build(family, **more), tokenizer(family.kind), "ab" * 32, family.model)


# ---------------------------------------------------------------- references


def outputs(model: Any, kind: str, embeds_TE: Tensor, answer: Tensor | None = None) -> Tensor:
    """Plain transformers on one row: last states [T, D] of a sentence encoder, else logits [T, V]; a decoder's at its own
    positions for an encoder-decoder."""
    more = {"decoder_input_ids": answer} if kind == "seq2seq" else {}
    found = model(inputs_embeds=embeds_TE[None], **more)
    return (found.last_hidden_state if kind == "sentence_encoder" else found.logits)[0]


def entered(
    model: Any, block: Any, given: Tensor, prompt_PD: Tensor, run: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The output where a prompt joins the input of a block, by hooks: the text's ids or the pixels run alone below it."""
    seen: list[Tensor] = []

    def look(module: Any, args: Any, kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        if not seen:
            seen.append(given)
            return None
        states = torch.cat([prompt_PD[None], seen[0]], dim=1)
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    hook = block.register_forward_pre_hook(look, with_kwargs=True)
    try:
        if run is None:
            _give_prompts_no_place(model)
            return [model(pixel_values=given[None]) for _ in range(2)][1].last_hidden_state[0]
        embeds_TE = model.get_input_embeddings()(given)
        run(embeds_TE)
        return run(torch.cat([embeds_TE[:1].expand(len(prompt_PD), -1), embeds_TE]))
    finally:
        hook.remove()


def _give_prompts_no_place(model: Any) -> None:
    """BEiT adds numbers for pairs of patches to the attention; pairs with a prompt get 0."""
    for part in model.modules():
        if type(part).__name__ == "BeitRelativePositionBias" and "forward" not in part.__dict__:

            def forward(window: Any, interpolates: bool, dim_size: int, own: Any = part.forward) -> Tensor:
                bias = own(window)
                wide = bias.new_zeros(1, bias.shape[1], dim_size, dim_size)
                wide[:, :, -bias.shape[2] :, -bias.shape[3] :] = bias
                return wide

            part.forward = forward


def read(backbone: Any, answer: str | None = None) -> list[EncodedInput]:
    return [backbone.tokenize(text, None, "the film was", answer, TOKENS) for text in TEXTS]


def expected(backbone: Any, model: Any, item: EncodedInput, logits: Tensor) -> Tensor:
    """A backbone's result from plain outputs behind a prompt: a feature, or the likelihood of the answer."""
    if backbone.kind == "sentence_encoder":
        return F.normalize(logits[TOKENS:].mean(0), dim=0)
    tail = item.content[len(item.content) - item.scored :]
    if backbone.kind == "causal_lm":
        places = torch.arange(TOKENS + item.length - item.scored, TOKENS + item.length) - 1
    elif backbone.kind == "masked_lm":
        places = TOKENS + (item.content[: item.length] == backbone.tokenizer.mask_token_id).nonzero()[:, 0]
    else:
        places = torch.arange(len(tail)) + len(backbone._start) - 1
    return logits[places].log_softmax(-1).gather(1, tail[:, None]).mean()


def off(backbone: Any, model: Any, layer: int, through: Callable[[Any, Tensor, Tensor], Tensor] | None = None) -> float:
    """The largest difference of features or likelihoods to the reference, over rows that are answered together.

    `through`: another reference, such as PEFT.
    """
    items, random = read(backbone, None if backbone.kind == "sentence_encoder" else "very good"), torch.Generator()
    hidden = backbone.encode_prefix(items, layer)
    prompts_SPD = torch.randn(len(items), TOKENS, hidden[0].shape[1], generator=random.manual_seed(1))
    said = backbone.forward(prompts_SPD, hidden, items, layer)
    ours = said.features_RD if backbone.kind == "sentence_encoder" else said.scores_RN[:, 0]
    theirs = []
    for item, prompt_PD in zip(items, prompts_SPD, strict=True):
        ids = item.content[: item.length]
        tail = item.content[item.length :]
        decoded = torch.cat([torch.tensor(backbone._start), tail[:-1]])[None] if backbone.kind == "seq2seq" else None

        def run(embeds_TE: Tensor, decoded: Any = decoded) -> Tensor:
            return outputs(model, backbone.kind, embeds_TE, decoded)

        if through is not None:
            logits = through(prompt_PD, ids, decoded)
        elif layer == 0:
            logits = run(torch.cat([prompt_PD, model.get_input_embeddings()(ids)]))
        else:
            logits = entered(model, blocks(model, backbone.kind)[layer], ids, prompt_PD, run)
        theirs.append(expected(backbone, model, item, logits))
    return float((ours - torch.stack(theirs)).abs().max())


def blocks(model: Any, kind: str) -> Sequence[Any]:
    """The first list of as many modules as the model has layers."""
    part = model.get_encoder() if kind == "seq2seq" else model
    return next(p for p in part.modules() if isinstance(p, torch.nn.ModuleList) and len(p) == LAYERS)


# ---------------------------------------------------------------- images

SIDE, PATCH = 16, 4
TOWER: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "image_size": SIDE, "patch_size": PATCH, "initializer_range": 0.3,
}  # fmt: skip
TEXT_HALF = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 12, "bos_token_id": 2, "eos_token_id": 3,
             "pad_token_id": 0, "projection_size": WIDTH}  # fmt: skip
HALVES = {"text_config": TEXT_HALF, "vision_config": TOWER}
VISION = {
    "ViT": Family("vision", "ViTModel", "ViTConfig", TOWER),
    "DeiT": Family("vision", "DeiTModel", "DeiTConfig", TOWER),
    "BEiT": Family("vision", "BeitModel", "BeitConfig", {**TOWER, "use_absolute_position_embeddings": True}),
    "BEiT (relative positions)": Family("vision", "BeitModel", "BeitConfig", {**TOWER, "use_relative_position_bias": True}),
    "BEiT (shared relative positions)": Family("vision", "BeitModel", "BeitConfig",
                                               {**TOWER, "use_shared_relative_position_bias": True}),
    "DINOv2": Family("vision", "Dinov2Model", "Dinov2Config", {**TOWER, "mlp_ratio": 2}),
    "DINOv2 with registers": Family("vision", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig",
                                    {**TOWER, "mlp_ratio": 2, "num_register_tokens": 3}),
    "DINOv3": Family("vision", "DINOv3ViTModel", "DINOv3ViTConfig", {**TOWER, "num_register_tokens": 3}),
    "CLIP": Family("vision", "CLIPModel", "CLIPConfig", {**HALVES, "projection_dim": 20}),
    "SigLIP": Family("vision", "SiglipModel", "SiglipConfig", HALVES),
    "Swin": Family("vision", "SwinModel", "SwinConfig", {"image_size": 32, "embed_dim": 16, "depths": [2, 2],
                                                         "num_heads": [2, 2], "window_size": 4}),
}  # fmt: skip


def load_vision(family: Family, model: Any) -> vision.Vision:
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    words = tokenizer("vision") if hasattr(model, "text_model") else None
    return vision.Vision(vision.Config(), model, processor, words, "ab" * 32, family.model)


def vision_line(backbone: vision.Vision, model: Any) -> dict[str, str]:
    """Features at layers 0 to 3 with a prompt, and CLIP's and SigLIP's logits without one."""
    items = [backbone.preprocess_image(image, TOKENS) for image in backbone.synthetic_inputs(3, 0)]
    pixels, tower, worst = backbone._pixels(items), getattr(model, "vision_model", model), []
    for layer in range(backbone.depth):
        hidden = backbone.encode_prefix(items, layer)
        prompts_SPD = torch.randn(3, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
        ours_SD = backbone.forward(prompts_SPD, hidden, items, layer).features_RD
        for row, prompt_PD in enumerate(prompts_SPD):
            block = blocks(tower, "vision")[layer]
            last_TD = entered(tower, block, pixels[row], prompt_PD)[TOKENS:]
            feature_D = feature(model, tower, last_TD)
            worst.append(float((ours_SD[row] - feature_D).abs().max()))
    if backbone.has_text_encoder:
        said = backbone.forward(torch.zeros(3, 0, WIDTH), hidden, items, layer).features_RD
        ours = said @ backbone.readout("the", ["film", "good story"]).T
        longest = {"padding": "max_length", "max_length": 12} if "Siglip" in type(model).__name__ else {"padding": True}
        words = backbone.tokenizer(["the film", "the good story"], return_tensors="pt", **longest)
        words = {"input_ids": words["input_ids"]} if "Siglip" in type(model).__name__ else words
        words.pop("token_type_ids", None)
        theirs = model(pixel_values=pixels, **words).logits_per_image
        worst.append(float((ours - ours[:, :1] - theirs + theirs[:, :1]).abs().max()))  # but for SigLIP's bias
    middle = "yes" if backbone.depth > 1 else "no"
    return {"layer 0": "yes", "middle": middle, "LoRA": "not compared", "difference": f"{max(worst):.0e}"}


def feature(model: Any, tower: Any, last_TD: Tensor) -> Tensor:
    """What the models' own code makes of the last states."""
    name = type(model).__name__
    if name == "CLIPModel":
        pooled_D = tower.post_layernorm(last_TD[0])
        return pooled_D / model.visual_projection(pooled_D).norm()
    if name == "SiglipModel":
        return F.normalize(tower.head(last_TD[None])[0], dim=0)
    if name == "BeitModel":
        return F.normalize(tower.pooler.layernorm(last_TD[1:].mean(0)), dim=0)
    return F.normalize(last_TD[0], dim=0)


# ---------------------------------------------------------------- a line of the table

TASK_TYPES = {"causal_lm": "CAUSAL_LM", "sentence_encoder": "FEATURE_EXTRACTION", "seq2seq": "SEQ_2_SEQ_LM"}


def with_peft(model: Any, kind: str, prompts: int) -> tuple[Any, Callable[..., Tensor]]:
    """PEFT's prompt tuning on a copy, and its outputs for a prompt and ids."""
    width = model.get_input_embeddings().weight.shape[1]
    config = peft.PromptTuningConfig(
        num_virtual_tokens=prompts, token_dim=width, num_transformer_submodules=1, task_type=TASK_TYPES[kind],
        num_attention_heads=1, num_layers=1,
    )  # fmt: skip
    theirs: Any = peft.get_peft_model(copy.deepcopy(model), config).eval()

    def through(prompt_PD: Tensor, ids_T: Tensor, decoded: Any = None) -> Tensor:
        theirs.prompt_encoder["default"].embedding.weight = torch.nn.Parameter(prompt_PD)
        more = {"decoder_input_ids": decoded} if decoded is not None else {}
        found = theirs(input_ids=ids_T[None], attention_mask=torch.ones(1, len(ids_T), dtype=torch.long), **more)
        return (found.last_hidden_state if kind == "sentence_encoder" else found.logits)[0]

    return theirs, through


def written(backbone: Any, layer: int) -> str:
    """How a decoder writes; "no" for other kinds. Raises `AssertionError` for other texts than those of whole forwards."""
    if not backbone.can_generate:
        return "no"
    prompt_PD = backbone.init_prompt("very good film", TOKENS, layer, 0)
    texts = backbone.generate(Prompt(prompt_PD, backbone.fingerprint, layer), TEXTS, 5)
    if backbone.kind == "seq2seq":
        return "cache"
    for text, found in zip(TEXTS, texts, strict=True):
        ids = backbone.tokenizer(text)["input_ids"]
        for _ in range(5):
            hidden = backbone.encode_prefix([EncodedInput(torch.tensor(ids), len(ids))], layer)
            states_STD, _ = backbone.frozen.run(prompt_PD[None], hidden, layer)
            ids = [*ids, int(backbone.frozen.logits(states_STD[:, TOKENS + len(ids) - 1]).argmax())]
            if ids[-1] == backbone.tokenizer.eos_token_id:
                break
        new = ids[len(backbone.tokenizer(text)["input_ids"]) :]
        assert backbone.tokenizer.decode(new, skip_special_tokens=True) == found
    return "cache" if backbone.writing.cached[layer] else "whole forwards"


def lora_off(backbone: Any, model: Any) -> float | None:
    """The difference of the last states with LoRA weights to PEFT's; None where no module can be changed."""
    adapters = backbone.adapters
    if not adapters.modules:
        return None
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[*adapters.modules])
    theirs: Any = peft.get_peft_model(copy.deepcopy(model), config).eval()
    begin_PD = adapters.start(2, 1)
    rows_SPD = torch.randn(2, *begin_PD.shape, generator=torch.Generator().manual_seed(2)) / 4
    ids_ST = torch.arange(5, 17).view(2, 6)
    body = backbone.frozen.body
    with adapters.applied(rows_SPD):
        ours = body(inputs_embeds=backbone.frozen.embed(ids_ST), **backbone.frozen._options(body)).last_hidden_state
    worst = 0.0
    for row, rows_PD in enumerate(rows_SPD):
        for name, (down, up) in adapters.split(rows_PD).items():
            changed = theirs.base_model.model.get_submodule(name)
            changed.lora_A["default"].weight.data, changed.lora_B["default"].weight.data = down.clone(), up.mT.clone()
        inner = theirs.base_model.model
        place = next(name for name, part in backbone.model.named_modules() if part is body)
        found = (inner.get_submodule(place) if place else inner)(input_ids=ids_ST[row : row + 1])
        worst = max(worst, float((found.last_hidden_state[0] - ours[row]).abs().max()))
    return worst


@torch.no_grad()
def line(name: str, family: Family) -> dict[str, str]:
    """One line of the table in docs/backbones.md."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        columns = ("layer 0", "middle", "writing", "LoRA", "PEFT export", "difference")
        found = {"family": name, "kind": family.kind, **dict.fromkeys(columns, "no")}
        try:
            backbone, model = load(family), build(family)
        except BackboneError:
            return found | {"difference": "refused"}
        if family.kind == "vision":
            return found | vision_line(backbone, model)
        found["layer 0"], worst = "yes", [off(backbone, model, 0)]
        if backbone.depth > 1:
            worst += [off(backbone, model, layer) for layer in (1, 2, 3)]
        found["middle"] = "yes" if backbone.depth > 1 else "no"
        writes = {written(backbone, layer) for layer in ({0, 2} if backbone.depth > 1 else {0})}
        found["writing"] = ", ".join(sorted(writes))
        lora = lora_off(backbone, model)
        found["LoRA"] = "no" if lora is None else "yes"
        worst += [] if lora is None else [lora]
        if family.kind in TASK_TYPES:
            worst.append(off(backbone, model, 0, with_peft(model, family.kind, TOKENS)[1]))
            found["PEFT export"] = "yes"
        return found | {"difference": f"{max(worst):.0e}"}
