"""Languages that a tokeniser turns into unknown tokens: how many are told, and who is warned."""

import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import berts
import small
from ficpd.backbones import catalog, sentence_encoder, weights
from ficpd.backbones.tokenised import unknown_share, warn_unk_rate
from ficpd.errors import BackboneWarning
from ficpd.experiments.build import build_context
from ficpd.types import Record

AMHARIC = "ፊልሙ ጥሩ ነበር"
THAI = berts.SCRIPTS["Thai"]
SIB200 = Path(__file__).parents[2] / ".." / "shared" / "data" / "sib200.parquet"


def says(folder: Path) -> list[str]:
    """The warnings of building a federation of an English and an Amharic client."""
    lines = ["text,target,language"]
    for number in range(12):
        lines += [f"the film was {('good', 'bad')[number % 2]} {text},{('good', 'bad')[number % 2]},{language}"
                  for text, language in (("", "English"), (AMHARIC, "Amharic"))]  # fmt: skip
    table = folder / "languages.csv"
    table.write_text("\n".join(lines) + "\n")
    changes = [
        f"backbone.name={berts.bert(folder / 'model')}", "backbone.kind=sentence_encoder", "backbone.options={}",
        f"data.source={table}", 'data.keep=["language"]', "partition.column=language",
    ]  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_context(small.experiment(folder, "fedavg", *changes))
    return [str(warning.message) for warning in caught if warning.category is BackboneWarning]


def test_the_worst_client_is_named_once(tmp_path):
    (said,) = says(tmp_path)
    assert said.startswith("43% of the tokens of client 'Amharic' (language Amharic) are unknown to ")
    assert "at 1 of 2 clients more than 5% are" in said
    assert "intfloat/multilingual-e5-small (backbone.name)" in said


def test_nobody_is_warned_of_a_twentieth(tmp_path):
    backbone = berts.load(berts.bert(tmp_path))
    known = [Record(f"row {i}", {"text": "the film was good", "text_pair": "a story"}) for i in range(60)]
    lost = [Record("lost", {"text": AMHARIC, "text_pair": "a"})]
    warn_unk_rate(backbone, {"most": known[:59] + lost, "none": known, "nobody": []})
    with pytest.warns(BackboneWarning, match=r"^75% of the tokens of lost .* at 1 of 3 clients"):
        warn_unk_rate(backbone, {"none": known, "lost": lost, "half": known[:1]})


@pytest.mark.parametrize("family", berts.FAMILIES)
def test_the_share_is_that_of_the_tokens(tmp_path, family):
    backbone = berts.load(berts.FAMILIES[family](tmp_path))
    share = backbone.unk_rate(["the film", f"{AMHARIC} good"])
    texts = ("the film", f"{AMHARIC} good")
    ids = [i for text in texts for i in backbone.tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert share == ids.count(backbone.tokenizer.unk_token_id) / len(ids) > 0.3
    assert backbone.unk_rate(["the film", *berts.SCRIPTS.values()]) == 0.0


def test_a_word_piece_tokeniser_loses_a_long_text_without_blanks_as_one_word(tmp_path):
    backbone = berts.load(berts.bert(tmp_path))
    assert backbone.unk_rate([THAI]) == 0.0
    assert backbone.unk_rate([THAI * 6]) == 1.0


def test_bytes_are_all_known():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<|end|>", *letters])}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel()
    for unknown in ({"unk_token": "<|end|>"}, {}):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>", bos_token="<|end|>", **unknown)
        assert unknown_share(tokenizer, ["the film", AMHARIC, THAI, ""]) == 0.0


@pytest.mark.slow
def test_what_minilm_does_not_know():
    """It loses most of Chinese and Thai and spells the rest of the world in letters, which counts as known."""
    if not SIB200.exists():
        pytest.skip("needs ../shared/data/sib200.parquet")
    options = {"dtype": torch.float32, "attention": "eager", "device": small.CPU, "name": "minilm"}
    source = weights.resolve(catalog.NAMED["minilm"].weights)
    minilm = sentence_encoder.build(sentence_encoder.Config(), source, **options)
    rows = pd.read_parquet(SIB200).groupby("lang").head(100)
    shares = {lang: minilm.unk_rate(texts.tolist()) for lang, texts in rows.groupby("lang")["text"]}
    assert max(shares["eng_Latn"], shares["deu_Latn"], shares["rus_Cyrl"], shares["arb_Arab"]) < 0.001
    assert min(shares["tha_Thai"], shares["zho_Hans"]) > 0.5
    assert 0.1 < shares["jpn_Jpan"] < 0.3
    own = {lang: [Record("", {"text": text}) for text in texts] for lang, texts in rows.groupby("lang")["text"]}
    with pytest.warns(BackboneWarning, match=r"of zho_Hans are unknown to minilm; at 3 of 24 clients"):
        warn_unk_rate(minilm, own)
