"""Prompts of words: what a client's choice goes by, what many words become, and what of it leaves."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import berts
import decoders
import planted
import small
from contracts.test_leak import leaks
from ficpd.backbones.query_engine import QueryEngine
from ficpd.errors import BackboneError, ConfigError
from ficpd.experiments.build import build_context
from ficpd.federation import codec
from ficpd.federation.client import ClientSession
from ficpd.library.library import PromptLibrary
from ficpd.library.session import load_library
from ficpd.methods.feddtpt import Config, FedDtpt, is_wrong
from ficpd.optimizers import LocalTrainingConfig
from ficpd.privacy import record_gaussian
from ficpd.types import TOKEN_DTYPE, Batch, ClientUpdate, ClientWorkload, ModelOutput, Prompt, Query

TRAINING = LocalTrainingConfig(local_steps=6, batch_size=16, learning_rate=1.0)
START = [10, 11, 12, 13, 14, 15]


@pytest.fixture
def model() -> QueryEngine:
    return QueryEngine(planted.Planted())


def members(model: QueryEngine, method, mechanism=None, count: int = 4, own_kind: bool = False):
    """Clients with records of all kinds, or each of one kind; they start from words that open nothing."""
    found = small.clients(model, method, count, mechanism=mechanism)
    for place, client in enumerate(found.values()):
        kinds = planted.KINDS[place % 4 : place % 4 + 1] if own_kind else planted.KINDS
        client.train = [record for kind in kinds for record in planted.records(kind, 16 // len(kinds), place)]
        client.test = [record for kind in planted.KINDS for record in planted.records(kind, 4, 99)]
        client.start = Prompt(torch.tensor(START)[:, None], model.backbone.fingerprint)
    return found


def accuracy(model: QueryEngine, client, ids_P1: torch.Tensor) -> float:
    query = Query(ids_P1[None], client.encoded("test"), loss=is_wrong)
    return 1 - float(model.answer([query])[0].loss_KB.mean())


@pytest.mark.parametrize("ids", [-1, 10**6])
def test_local_update_of_ids_that_are_no_words_fails_before_a_record_is_sampled(model, ids):
    method = small.method("feddtpt", TRAINING)
    own = members(model, method)
    assignment = method.make_assignment(small.first_state(method, own), next(iter(own.values())).card, 1)
    assignment = replace(assignment, arrays={"prompt": torch.full((len(START), 1), ids)})
    method.validate_assignment(assignment, own["site-0"].start)  # which knows no vocabulary
    session = ClientSession(own["site-0"], 1)
    session.batches = None  # type: ignore[method-assign, assignment]
    with pytest.raises(BackboneError, match="token ids"):
        next(method.local_update(session, assignment))


def test_words_are_found_by_accuracy_alone_and_together_they_beat_the_average_clients(model):
    """From 0 right: in a round the common prompt is about as good as the clients' own are on average, and in the end better
    than what each would have found by itself in as many rounds."""
    method = small.method("feddtpt", TRAINING)
    own = members(model, method)
    client, state = next(iter(own.values())), small.first_state(method, own)
    assert accuracy(model, client, state.arrays["prompt"]) == 0.0
    for round in (1, 2, 3, 4):
        updates = small.updates(method, own.values(), state, model, round)
        alone = [accuracy(model, client, u.arrays["words"].long()[:, None]) for u in updates]
        state = method.aggregate(state, updates, round, model)
        assert accuracy(model, client, state.arrays["prompt"]) >= sum(alone) / len(alone) - 0.1
    together = accuracy(model, client, state.arrays["prompt"])
    by_themselves = []
    for name in own:
        apart = small.first_state(method, own)
        for round in (1, 2, 3, 4):
            apart = method.aggregate(apart, [small.update(method, own[name], apart, model, round)], round, model)
        by_themselves.append(accuracy(model, client, apart.arrays["prompt"]))
    assert together > sum(by_themselves) / len(by_themselves) + 0.1
    assert together == 1.0


def test_clients_of_one_round_are_offered_the_same_words_and_of_another_round_others(model):
    method = small.method("feddtpt", TRAINING)
    own = members(model, method)
    state = small.first_state(method, own)

    def offered(client, round: int) -> list[int]:
        work = method.local_update(ClientSession(client, round), method.make_assignment(state, client.card, round))
        return next(work).prompts_KPD[:, (round - 1) * TRAINING.local_steps % len(START), 0].tolist()

    first, second = list(own.values())[:2]
    assert offered(first, 1) == offered(second, 1)
    assert offered(first, 1)[1:] != offered(first, 2)[1:]
    assert len(set(offered(first, 1))) == 9, "eight others, and the one that stands there"


def test_what_stands_there_stays_unless_another_word_is_better(model):
    method = small.method("feddtpt", TRAINING)
    own = members(model, method)
    client = next(iter(own.values()))
    keys = torch.tensor([0, 1, 2, 3, 14, 15])[:, None]
    client.start = Prompt(keys, model.backbone.fingerprint)
    state = small.first_state(method, own)
    assert small.update(method, client, state, model).arrays["words"].tolist() == keys[:, 0].tolist()


def test_right_is_only_what_scores_above_all_others():
    task, targets = small.classes(), torch.tensor([0, 0, 1])
    batch = Batch(task, ((), (), ()), targets, torch.eye(2), 0)
    told = ModelOutput(torch.tensor([[2.0, 1.0], [1.0, 1.0], [2.0, 1.0]]))
    assert is_wrong(told, batch).tolist() == [0.0, 1.0, 1.0]


def test_a_task_without_answers_to_choose_from_goes_by_its_loss():
    task = small.numbers()
    batch = Batch(task, ((), ()), torch.tensor([1.0, 5.0]), torch.eye(2), 0)
    outputs = ModelOutput(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    assert torch.equal(is_wrong(outputs, batch), task.loss(outputs, batch))


def record_level(noise_multiplier: float, steps: int = 6, clip_norm: float = 1.0):
    config = record_gaussian.Config(noise_multiplier=noise_multiplier, clip_norm=clip_norm, delta=1e-3)
    return record_gaussian.build(config, ClientWorkload(32, 1.0, steps, 1, 1, 1.0, 1))


class Watching:
    """Passes all on, and keeps what it was asked to average."""

    def __init__(self, mechanism):
        self.mechanism, self.averaged = mechanism, []

    def __getattr__(self, name):
        return getattr(self.mechanism, name)

    def noisy_mean(self, values_KB, expected_batch, noise, grad_scale=None):
        self.averaged.append(values_KB.clone())
        return self.mechanism.noisy_mean(values_KB, expected_batch, noise, grad_scale)


def test_each_step_is_one_noised_sum_over_all_candidates_and_is_paid_for(model):
    watching = Watching(record_level(2.0))
    method = small.method("feddtpt", TRAINING)
    own = members(model, method, watching, count=1)
    client = next(iter(own.values()))
    update = small.update(method, client, small.first_state(method, own), model)
    assert [(line.name, line.noise_multiplier, line.count) for line in client.account.spent()] == [("prompt", 2.0, 6)]
    assert [tuple(v.shape[:1]) for v in watching.averaged] == [(9,)] * 6
    for values_KB in watching.averaged:
        assert values_KB.sum(0).abs().max() < 1e-5, "less its own mean: a record that all answer alike weighs nothing"
        assert values_KB.abs().max() <= 1
    assert (update.arrays["words"].dtype, update.weight) == (TOKEN_DTYPE, 1.0)


def test_with_little_noise_it_chooses_as_without_and_with_much_it_does_not(model):
    chosen = {}
    for kind, mechanism in {"none": None, "little": record_level(1e-4), "much": record_level(1e4)}.items():
        method = small.method("feddtpt", TRAINING.model_copy(update={"batch_size": 32}))
        own = members(model, method, mechanism, count=1)
        state = small.first_state(method, own)
        for round in (1, 2):
            state = method.aggregate(state, small.updates(method, own.values(), state, model, round), round, model)
        chosen[kind] = accuracy(model, next(iter(own.values())), state.arrays["prompt"])
    assert chosen["little"] == chosen["none"] > 0
    assert chosen["much"] < chosen["none"]


class ChoosesByItself(FedDtpt):
    """By the records' own mean, past the mechanism."""

    def local_update(self, client, order):
        def mean(values_KB):
            client.private_mean(values_KB)
            return values_KB.mean(1)

        beside = SimpleNamespace(
            id=client.id, weight=client.weight, vocabulary=client.vocabulary, batches=client.batches, private_mean=mean
        )
        return super().local_update(beside, order)


def test_a_choice_past_the_mechanism_is_seen_in_the_words_that_leave():
    tiny = QueryEngine(small.backbone())
    assert leaks(ChoosesByItself(Config(), small.TRAINING), tiny)
    assert not leaks(FedDtpt(Config(), small.TRAINING), tiny)


def test_words_travel_as_integers_of_four_bytes_whatever_the_compression(tmp_path):
    few = small.run(tmp_path / "a", "feddtpt", "prompt.num_tokens=3").bytes.up_per_client_round
    more = small.run(tmp_path / "b", "feddtpt", "prompt.num_tokens=8", "compression.name=none", "compression.bits=8")
    assert more.bytes.up_per_client_round - few == 5 * 4


def test_large_ids_pass_the_check_of_the_norm_and_ids_that_are_no_words_are_set_aside_by_name(model):
    method = small.method("feddtpt", TRAINING)
    own = members(model, method)
    state = small.first_state(method, own)
    layout = small.wire(method.update_spec(state))
    huge = ClientUpdate("site-9", {"words": torch.full((6,), 2**31 - 1, dtype=TOKEN_DTYPE)})
    body = codec.encode_update(huge, 1, "tiny")
    read = codec.decode_update(body, codec.ExpectedUpdate("site-9", 1, "tiny", layout, 1.0))
    assert read.arrays["words"][0] == 2**31 - 1
    honest = [ClientUpdate(f"site-{i}", {"words": torch.tensor(START, dtype=TOKEN_DTYPE)}) for i in range(2)]
    below = ClientUpdate("site-8", {"words": torch.tensor([-1, *START[1:]], dtype=TOKEN_DTYPE)})
    after = method.aggregate(state, [*honest, below, huge], 1, model)
    assert after.facts["excluded_updates"].keys() == {"site-8", "site-9"}
    assert after.arrays["prompt"][:, 0].tolist() == START
    assert method.aggregate(state, [huge], 1, model).arrays["prompt"][:, 0].tolist() == START


def test_a_run_leaves_vectors_that_predict_as_the_words_did_and_says_how_they_read(tmp_path):
    result = small.run(tmp_path, "feddtpt")
    library = PromptLibrary.load(tmp_path / "run")
    assert (library.start.enters_at, tuple(library.prompts["global"].vectors_PD.shape)) == (0, (3, 16))
    page = (tmp_path / "run" / "library" / "README.md").read_text()
    assert "`global` reads: " + json.dumps(library.card["words"]["global"]) in page
    opened, experiment = load_library(tmp_path / "run"), small.experiment(tmp_path, "feddtpt")
    test = [record for shard in build_context(experiment).shards.values() for record in shard.test]
    assert opened.evaluate(test)["accuracy"] == pytest.approx(result.scores.global_prompt["accuracy"])
    assert len(opened.predict(test)) == len(test)


@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm"])
def test_words_answer_as_their_vectors_do_and_are_proposed_whole(tmp_path, kind):
    write, load = (decoders.write, decoders.load) if kind == "causal_lm" else (berts.bert, berts.load)
    backbone = load(write(tmp_path))
    ids = torch.tensor(backbone.vocabulary.ids("the film was good"))
    task = small.classes()
    start = Prompt(ids[:, None], backbone.fingerprint)
    batch = task.encode(small.records(5), backbone, start)
    words = QueryEngine(backbone).answer([Query(start.vectors_PD[None], batch)])[0].loss_KB
    vectors = backbone.init_prompt("the film was good", 4, 0, 0)
    assert small.close(words, QueryEngine(backbone).answer([Query(vectors[None], batch)])[0].loss_KB)
    proposed, again, other = (backbone.vocabulary.proposals(ids.tolist(), 1, 6, seed) for seed in (3, 3, 4))
    assert len(set(proposed)) == 6
    assert int(ids[1]) not in proposed
    assert all(backbone.vocabulary.ids(backbone.vocabulary.text([one])) == [one] for one in proposed)
    assert proposed == again != other


def test_a_masked_language_model_proposes_what_it_expects_there(tmp_path):
    """The one word that it puts nearly all weight on comes first, whatever the seed."""
    backbone = berts.load(berts.bert(tmp_path))
    ids, wanted = backbone.vocabulary.ids("the film was good"), backbone.vocabulary.ids("dull")[0]
    sharp = torch.zeros(backbone.vocabulary.size)
    sharp[wanted] = 50.0
    backbone.vocabulary.likely = lambda given, place: sharp
    assert {backbone.vocabulary.proposals(ids, 2, 1, seed)[0] for seed in range(5)} == {wanted}
    plain = berts.load(tmp_path)  # its vocabulary does not keep it alive
    filled = plain.vocabulary.likely(ids, 2)
    other = plain.vocabulary.likely([*ids[:2], wanted, *ids[3:]], 2)
    assert torch.equal(filled, other), "what stands in the place is not looked at"
    assert not small.close(filled, plain.vocabulary.likely(ids, 1), 1e-3)


def test_what_words_cannot_be_asked_with_is_refused(model):
    batch = small.classes().encode(small.records(2), model.backbone, small.start(model, small.classes()))
    ids = torch.tensor(START)[None, :, None]
    with pytest.raises(BackboneError, match="enters planted at layer 0"):
        model.answer([Query(ids, batch)])
    flat = small.classes().encode(small.records(2), model.backbone, small.start(model, small.classes(), enters_at=0))
    with pytest.raises(BackboneError, match="without gradients"):
        model.answer([Query(ids, flat, grad=True)])
    with pytest.raises(BackboneError, match="token ids 10 to 5000"):
        model.backbone.vocabulary.vectors(torch.tensor([10, 5000]))


def test_a_head_and_a_librarys_vectors_are_no_words(tmp_path):
    with pytest.raises(ConfigError, match="tuned_head = true"):
        small.run(tmp_path, "feddtpt", "task.tuned_head=true")
    small.run(tmp_path / "a", "fedavg")
    with pytest.raises(ConfigError, match=r"prompt.init = 'library'"):
        small.run(tmp_path / "b", "feddtpt", "prompt.init=library", f"prompt.library={tmp_path / 'a' / 'run'}")
