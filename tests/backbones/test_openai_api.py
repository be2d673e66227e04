"""A model behind an HTTP address: what it says, and what becomes of it when the server is down, slow, busy or mad."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import berts
import decoders
import small
from ficpd.backbones import openai_api
from ficpd.backbones.query_engine import QueryEngine
from ficpd.errors import BackboneError, ConfigError, LibraryError
from ficpd.library.library import PromptLibrary
from ficpd.library.session import load_library
from ficpd.tasks import classification
from ficpd.types import Batch, Prompt, Query
from remote import Served, serving

TASK = {"instruction": "sentiment is", "labels": {"good": "good", "bad": "very bad"}}
TEXTS = ["the film was good", "a dull story", "we saw a fine film"]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Any:
    return decoders.load(decoders.write(tmp_path_factory.mktemp("decoder")))


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    return berts.bert(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def running(decoder):
    with serving(Served(decoder.model, decoder.tokenizer)) as served:
        yield served


@pytest.fixture
def served(running):
    running.asked, running.faults, running.scores, running.spoils = [], [], True, lambda answer: answer
    return running


@pytest.fixture
def built(served, words):
    def build(**options: Any) -> openai_api.Endpoint:
        whole = {"url": served.url, "model": "small", "words": str(words), "tries": 3, **options}
        how: Any = {"dtype": torch.float32, "attention": "eager", "device": small.CPU, "name": "openai_api"}
        found = openai_api.build(openai_api.Config(**whole), None, **how)
        served.asked.clear()
        return found

    return build


def ids_of(backbone: openai_api.Endpoint, *texts: str) -> torch.Tensor:
    return torch.tensor([backbone.vocabulary.ids(text) for text in texts])[..., None]


def batch_of(backbone: openai_api.Endpoint, texts: list[str] = TEXTS) -> Batch:
    task = classification.build(classification.Config(**TASK))
    records = [small.Record(f"row {i}", {"text": text, "target": "good"}) for i, text in enumerate(texts)]
    return task.encode(records, backbone, Prompt(ids_of(backbone, "the story")[0], backbone.fingerprint))


def scores(backbone: openai_api.Endpoint, texts: list[str] = TEXTS, prompts: tuple[str, ...] = ("the story",)):
    query = Query(ids_of(backbone, *prompts), batch_of(backbone, texts), outputs=True)
    outputs = QueryEngine(backbone).answer([query])[0].outputs_KB
    assert outputs is not None
    assert outputs.scores_RN is not None
    return outputs.scores_RN


def test_an_answers_score_is_its_mean_log_likelihood_behind_prompt_text_and_instruction(built, decoder, served):
    backbone = built()
    found = scores(backbone, prompts=("the story", "good film"))
    assert found.shape == (6, 2)
    for row, front, text in [(0, "the story", TEXTS[0]), (4, "good film", TEXTS[1])]:
        for column, answer in enumerate(TASK["labels"].values()):
            before = decoder.tokenizer(f"{front}\n{text}\nsentiment is")["input_ids"]
            ids = before + decoder.tokenizer(answer)["input_ids"]
            likely = decoder.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            own = [float(likely[i - 1, ids[i]]) for i in range(len(before), len(ids))]
            assert float(found[row, column]) == pytest.approx(sum(own) / len(own), abs=1e-4)
    assert backbone.asking.answered == 1 + 12, "one probe, and one question for each prompt, record and answer"


def test_without_likelihoods_the_answer_that_is_named_first_is_right_and_all_else_a_guess(built, served):
    served.scores = False
    backbone = built(answers="auto")
    assert not backbone.likelihoods
    said = ["It is Very  bad", "very bad, not good", "goodness knows", "good and very bad", ""]
    befores = [f"text {i}" for i in range(5) for _ in range(2)]
    backbone._texts = lambda b, n, m=None: [said[int(one.split()[1])] for one in b]  # type: ignore[method-assign]
    found = backbone._named(befores, ["good", "very bad"] * 5)
    right = [found[2 * i : 2 * i + 2].index(0.0) for i in range(5)]
    assert [right[i] for i in (1, 3)] == [1, 0]
    assert Counter(found) == {0.0: 5, openai_api.WRONG_LOGPROB: 5}, "one that names nothing is always the same guess"
    assert found == backbone._named(befores, ["good", "very bad"] * 5)


def test_text_alone_costs_one_question_a_record_whatever_the_answers(built, served):
    served.scores = False
    found = scores(built())
    assert len(served.asked) == len(TEXTS)
    assert set(found.flatten().tolist()) == {0.0, openai_api.WRONG_LOGPROB}
    assert (found == 0.0).sum(1).tolist() == [1] * len(TEXTS)


def test_a_chat_says_what_completions_do_where_there_is_no_template(built, served):
    served.scores = False
    alone, chat = scores(built()), scores(built(api="chat"))
    assert [body["messages"][0]["role"] for body, _, _ in served.asked] == ["user"] * 3
    assert torch.equal(alone, chat)
    with pytest.raises(BackboneError, match='needs api = "completions"'):
        built(api="chat", answers="likelihood")


def test_it_writes_and_says_the_same_again(built, decoder):
    backbone = built()
    prompt = Prompt(ids_of(backbone, "the story")[0], backbone.fingerprint)
    written = backbone.generate(prompt, TEXTS, 3)
    item = backbone.tokenize(TEXTS[0], None, "", None, 2)
    assert backbone.generate_greedy(prompt.vectors_PD[None, :, 0], [item], 0, 3) == written[:1]
    assert written == backbone.generate(prompt, TEXTS, 3)
    with pytest.raises(BackboneError, match="the prompt is for tiny"):
        backbone.generate(Prompt(prompt.vectors_PD, "tiny"), TEXTS, 3)


def test_texts_that_travel_together_are_told_apart_by_their_index(built, served):
    alone, together = scores(built()), scores(built(together=4))
    assert sorted(len(body["prompt"]) for body, _, _ in served.asked) == [2, 4]
    assert torch.allclose(alone, together)


def test_a_long_text_is_cut_and_nothing_else(built):
    backbone = built(max_words=20)
    item = backbone.tokenize("one  two " * 30, "a pair " * 20, "it is", "good", 3)
    text, pair, instruction = item.content.before.split("\n")
    assert (len(text.split()), len(pair.split()), instruction) == (7, 7, "it is")
    assert text.startswith("one  two")
    with pytest.raises(BackboneError, match="leave nothing of the 20 words"):
        backbone.tokenize("one", None, "it is", "good", 17)


def test_soft_prompts_gradients_and_heads_are_refused_with_what_to_do(built):
    backbone = built()
    batch, soft = batch_of(backbone), torch.zeros(1, 2, 1)
    with pytest.raises(BackboneError, match=r"takes words, no vectors: a soft prompt \[2, 1\].*feddtpt"):
        QueryEngine(backbone).answer([Query(soft, batch)])
    with pytest.raises(BackboneError, match=r"gives no gradients|without gradients"):
        QueryEngine(backbone).answer([Query(ids_of(backbone, "the story"), batch, grad=True)])
    with pytest.raises(BackboneError, match=r"tuned_head = false"):
        backbone.head_to_readout(soft[0])
    with pytest.raises(BackboneError, match="token ids 0 to 99999"):
        backbone.vocabulary.vectors(torch.tensor([0, 99999]))


def test_its_fingerprint_is_of_model_and_words_and_not_of_the_address(built, served):
    one = built()
    assert one.fingerprint == built(url=served.url + "/", timeout=3).fingerprint
    assert one.fingerprint != built(model="another").fingerprint


@pytest.mark.parametrize(("status", "advice"), [(301, "options.url"), (404, "options.url"), (422, "options.model")])
def test_what_no_waiting_mends_is_said_at_once(built, served, status, advice):
    backbone = built(workers=1)
    served.faults = [{"status": status}]
    with pytest.raises(BackboneError, match=rf"refuses: {status} no\. Check backbone\.{advice}"):
        scores(backbone, TEXTS[:1])
    assert len(served.asked) == 1


@pytest.mark.parametrize("url", ["127.0.0.1:80/v1", "ftp://host/v1", "http:///v1"])
def test_an_address_that_is_none_is_refused(built, url):
    with pytest.raises(BackboneError, match=r"options.url = .*expected an address such as"):
        built(url=url)


def test_a_key_in_the_address_is_refused_and_not_repeated(built):
    with pytest.raises(BackboneError, match="key_from") as refused:
        built(url="http://me:secret@host/v1")
    assert "secret" not in str(refused.value)


def test_a_server_that_is_down_is_asked_as_often_as_was_said_and_then_given_up_by_name(built):
    gone = r"http://127.0.0.1:9/v1/completions gave no answer .tries = 3.*ConnectError.*options.url"
    with pytest.raises(BackboneError, match=gone):
        built(url="http://127.0.0.1:9/v1")


@pytest.mark.slow
def test_a_slow_answer_is_asked_for_again_and_counted_once(built, served):
    backbone = built(timeout=2.0)
    served.faults = [{"delay": 3.0}]
    found = scores(backbone)
    assert (backbone.asking.answered, len(served.asked)) == (1 + 6, 7)
    assert Counter(Counter(served.texts).values()) == {1: 5, 2: 1}
    assert torch.allclose(found, scores(built()))


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_left_alone_as_long_as_it_asks(built, served, status):
    backbone = built(workers=1)
    served.faults = [{"status": status, "headers": {"Retry-After": "1"}}]
    scores(backbone, TEXTS[:1])
    first, second, _ = [when for _, when, _ in served.asked]
    assert second - first >= 1.0
    assert served.texts[0] == served.texts[1]
    assert backbone.asking.answered == 1 + 2


def test_a_rest_that_is_too_long_or_never_ends_is_given_up(built, served):
    backbone = built(workers=1)
    served.faults = [{"status": 429, "headers": {"Retry-After": "3600"}}]
    with pytest.raises(BackboneError, match=r"gave no answer .*429 no, Retry-After 3600"):
        scores(backbone, TEXTS[:1])
    assert len(served.asked) == 1
    served.faults = [{"status": 500, "body": "of all things"}] * 3
    with pytest.raises(BackboneError, match=r"tries = 3.*500 of all things"):
        scores(backbone, TEXTS[:1])
    assert backbone.asking.answered == 1, "only the probe had an answer"


def test_what_was_answered_before_a_failure_is_not_asked_again(built, served):
    backbone = built(workers=1)
    served.faults = [None, None, {"status": 400, "body": "too long"}]
    with pytest.raises(BackboneError, match=r"refuses: 400 too long.*options.model"):
        scores(backbone)
    assert len(served.asked) == 3
    found = scores(backbone)
    assert Counter(Counter(served.texts).values()) == {1: 5, 2: 1}, "each question but the refused one was sent once"
    assert backbone.asking.answered == 1 + 6
    served.asked.clear()
    assert torch.equal(found, scores(backbone))
    assert served.asked == []


NONSENSE = {
    "no JSON": "<html>gateway</html>",
    "another object": {"error": "sorry"},
    "a list": [1, 2],
    "too many choices": {"choices": [{"text": "a"}, {"text": "b"}]},
    "no choices": {"choices": []},
    "a text that is none": {"choices": [{"text": 3}]},
    "no logprobs": {"choices": [{"text": "good"}]},
    "an index twice": {"choices": [{"text": "a", "index": 4}]},
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_refused_by_name_and_not_counted(built, served, kind):
    backbone = built(workers=1)
    served.faults = [{"body": NONSENSE[kind]}]
    with pytest.raises(BackboneError, match=r"/v1/completions answered .* was expected"):
        scores(backbone, TEXTS[:1])
    assert backbone.asking.answered == 1
    assert scores(backbone, TEXTS[:1]).isfinite().all()


SPOILT = {
    "one value too few": lambda told: told["token_logprobs"].pop(),
    "one token too few": lambda told: [told[name].pop() for name in told] and [told[name].pop() for name in told],
    "a positive likelihood": lambda told: told["token_logprobs"].__setitem__(2, 0.5),
    "one that is not finite": lambda told: told["token_logprobs"].__setitem__(2, math.nan),
    "one that is missing": lambda told: told["token_logprobs"].__setitem__(2, None),
    "offsets that fall": lambda told: told["text_offset"].reverse(),
    "a text that begins later": lambda told: told["text_offset"].__setitem__(0, 1),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_likelihoods_that_do_not_fit_the_text_are_refused(built, served, kind):
    backbone = built(workers=1)

    def spoils(answer: Any) -> Any:
        for choice in answer["choices"]:
            SPOILT[kind](choice["logprobs"])
        return answer

    served.spoils = spoils
    with pytest.raises(BackboneError, match="was expected"):
        scores(backbone, TEXTS[:1])
    assert backbone.asking.answered == 1


def test_likelihoods_that_must_be_had_and_are_not(built, served):
    served.scores = False
    with pytest.raises(BackboneError, match="logprobs was expected"):
        built(answers="likelihood")


def test_the_key_is_sent_and_stands_in_no_error(built, served, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-very-secret")
    backbone = built(key_from="SOME_KEY", workers=1)
    served.faults = [{"status": 401, "body": "wrong key sk-very-secret"}]
    with pytest.raises(BackboneError, match=r"401 wrong key \*\*\*. Check the key in SOME_KEY"):
        scores(backbone, TEXTS[:1])
    assert served.asked[0][2]["authorization"] == "Bearer sk-very-secret"
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(BackboneError, match="environment variable SOME_KEY is empty"):
        scores(backbone, TEXTS[1:2])


def test_keys_of_the_environment_that_no_option_names_are_not_sent(built, served, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "sk-very-secret")
    scores(built(), TEXTS[:1])
    assert not any("sk-very-secret" in value for _, _, headers in served.asked for value in headers.values())
    assert not any("authorization" in headers for _, _, headers in served.asked)


def changes(served: Served, words: Path, **more: Any) -> list[str]:
    options = {"url": served.url, "model": "small", "words": str(words), "key_from": "SOME_KEY", **more}
    told = ", ".join(f"{key} = {value!r}" for key, value in options.items())
    return [
        "backbone.name=openai_api", f"backbone.options={{ {told} }}", "training.batch_size=2", "method.candidates=2",
    ]  # fmt: skip


def test_a_run_on_it_leaves_a_library_of_words_that_predicts_and_no_key(served, words, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-very-secret")
    result = small.run(tmp_path, "feddtpt", *changes(served, words), rounds=2)
    assert all(header["authorization"] == "Bearer sk-very-secret" for _, _, header in served.asked)
    written = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert not any(b"sk-very-secret" in file.read_bytes() for file in written)
    library = PromptLibrary.load(tmp_path / "run")
    prompt = library.prompts["global"].vectors_PD
    assert (prompt.dtype, tuple(prompt.shape)) == (torch.int64, (3, 1))
    assert library.card["words"]["global"] in (tmp_path / "run" / "library" / "README.md").read_text()
    opened = load_library(tmp_path / "run")
    assert opened.model.backbone.vocabulary.text(prompt[:, 0].tolist()) == library.card["words"]["global"]
    assert len(opened.predict(small.records(4, 7), prompt="global")) == 4
    assert result.backbone.fingerprint.startswith("endpoint:")


@pytest.mark.parametrize("how", ["auto", "demonstrations"])
def test_a_library_of_words_adapts_by_showing_examples(served, words, tmp_path, monkeypatch, how):
    monkeypatch.setenv("SOME_KEY", "x")
    small.run(tmp_path, "feddtpt", *changes(served, words), rounds=1)
    records = small.records(6, 3)
    adapted = load_library(tmp_path / "run").adapt(records, how=how)
    served.asked.clear()
    assert len(adapted.predict(small.records(2, 7))) == 2
    if how == "demonstrations":
        assert any(record.fields["text"] in served.asked[-1][0]["prompt"] for record in records)


def test_in_context_examples_are_shown_to_an_endpoint(served, words, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "x")
    small.run(tmp_path, "icl", *changes(served, words)[:2], rounds=1)
    assert served.asked[-1][0]["prompt"].count("it was good") > 1


def test_a_librarys_address_is_used_only_if_it_is_here_or_its_user_set_it(served, words, monkeypatch):
    card = {"url": "https://elsewhere.example/v1", "model": "small", "key_from": "SOME_KEY"}
    monkeypatch.delenv("FICPD_ENDPOINT", raising=False)
    told = r"would send it your texts; .* set FICPD_ENDPOINT=https://elsewhere.example/v1"
    with pytest.raises(LibraryError, match=told):
        openai_api.options_from_card(card)
    assert openai_api.options_from_card({**card, "url": served.url})["url"] == served.url
    monkeypatch.setenv("FICPD_ENDPOINT", served.url)
    assert openai_api.options_from_card(card) == {**card, "url": served.url}


def test_methods_that_tune_vectors_are_refused_before_anything_is_written(served, words, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "x")
    for method in ("fedavg", "centralized", "local"):
        with pytest.raises(ConfigError, match=rf"openai_api takes prompts of words, and {method} tunes vectors"):
            small.run(tmp_path, method, *changes(served, words)[:-1])
        assert not (tmp_path / "run").exists()
