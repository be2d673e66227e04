from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ficpd.data.partition import Config, partition
from ficpd.data.untyped import UntypedStr
from ficpd.errors import DataError
from ficpd.types import ClientData, Record

DOMAINS = ("tweets", "films", "products")


def records(side: str, number: int, targets=("no", "yes")) -> list[Record]:
    rows = [{"domain": DOMAINS[i % 3], "target": targets[(i // 3) % len(targets)]} for i in range(number)]
    return [Record(f"{side} {i}", row) for i, row in enumerate(rows)]


def data(train: int = 600, test: int = 150, targets=("no", "yes")) -> ClientData:
    return ClientData(records("train", train, targets), records("test", test, targets), {})


def skew(shards: dict[str, ClientData], side: str = "train") -> float:
    """Mean distance of the clients' label shares from the whole's; 0 when all are alike."""
    counts = [Counter(r.fields["target"] for r in getattr(shard, side)) for shard in shards.values()]
    labels = sorted({label for count in counts for label in count})
    table = np.array([[count[label] for label in labels] for count in counts], dtype=float)
    return float(np.abs(table / table.sum(1, keepdims=True) - table.sum(0) / table.sum()).sum(1).mean())


CONFIGS = st.one_of(
    st.builds(Config, kind=st.just("column"), column=st.just("domain")),
    st.builds(Config, kind=st.just("iid"), num_clients=st.integers(1, 12)),
    st.builds(Config, kind=st.just("dirichlet"), num_clients=st.integers(1, 5), concentration=st.floats(0.5, 100)),
    st.builds(
        Config,
        kind=st.just("column_dirichlet"),
        column=st.just("domain"),
        num_clients=st.integers(3, 9),
        concentration=st.floats(0.5, 100),
    ),
)


@settings(deadline=None, max_examples=60)
@given(config=CONFIGS, test=st.integers(0, 40), real=st.booleans(), seed=st.integers(0, 2**40))
def test_every_record_goes_to_exactly_one_client(config, test, real, seed):
    whole = data(120, test, [i / 7 for i in range(11)] if real else ("no", "yes", "perhaps"))
    shards = partition(config, whole, "target", seed)
    for side in ("train", "test"):
        dealt = [record.key for shard in shards.values() for record in getattr(shard, side)]
        assert sorted(dealt) == sorted(record.key for record in getattr(whole, side))
    assert all(shard.train for shard in shards.values())
    assert list(shards) == sorted(shards)


def test_a_column_makes_one_client_of_each_value():
    shards = partition(Config(kind="column", column="domain"), data(), "target", 0)
    assert list(shards) == ["films", "products", "tweets"]
    assert shards["tweets"].metadata == {"domain": "tweets"}
    for name, shard in shards.items():
        assert {r.fields["domain"] for r in shard.train + shard.test} == {name}
        assert (len(shard.train), len(shard.test)) == (200, 50)


def test_iid_clients_are_alike_and_equally_large():
    shards = partition(Config(kind="iid", num_clients=7), data(), "target", 0)
    assert max(len(s.train) for s in shards.values()) - min(len(s.train) for s in shards.values()) <= 1
    assert list(shards)[:2] == ["client-0", "client-1"]
    assert skew(shards) < 0.25
    assert all(shard.metadata == {} for shard in shards.values())


def test_iid_needs_no_target():
    whole = ClientData([Record(str(i), {"text": "x"}) for i in range(10)], [], {})
    assert len(partition(Config(kind="iid", num_clients=10), whole, "target", 0)) == 10


def test_a_smaller_concentration_is_more_skewed():
    def mean_skew(concentration):
        config = Config(kind="dirichlet", num_clients=6, concentration=concentration)
        return np.mean([skew(partition(config, data(1200), "target", seed)) for seed in range(8)])

    strong, middle, weak = mean_skew(0.1), mean_skew(1.0), mean_skew(1000.0)
    assert strong > middle + 0.1 > weak + 0.2
    assert weak < 0.1


def test_test_records_follow_their_clients_own_skew():
    config = Config(kind="dirichlet", num_clients=4, concentration=0.5)
    shards = partition(config, data(3000, 3000), "target", 5)
    for shard in shards.values():
        train, test = (Counter(r.fields["target"] for r in side) for side in (shard.train, shard.test))
        assert train == test


def test_column_dirichlet_gives_the_largest_value_one_more():
    whole = data(601)
    config = Config(kind="column_dirichlet", column="domain", num_clients=10, concentration=1.0)
    shards = partition(config, whole, "target", 0)
    assert Counter(name.rpartition("-")[0] for name in shards) == {"tweets": 4, "films": 3, "products": 3}
    assert "tweets-3" in shards
    for name, shard in shards.items():
        assert shard.metadata == {"domain": name.rpartition("-")[0]}
        assert {r.fields["domain"] for r in shard.train + shard.test} <= {name.rpartition("-")[0]}


def test_names_are_padded_so_that_they_sort_by_number():
    shards = partition(Config(kind="iid", num_clients=11), data(), "target", 0)
    assert list(shards)[1:3] == ["client-01", "client-02"]
    assert list(shards)[-1] == "client-10"


def test_real_targets_are_skewed_by_quantile():
    targets = np.random.default_rng(0).permutation(np.linspace(-4, 4, 997)).tolist()
    whole = data(2000, 200, targets)

    def spread(concentration):
        config = Config(kind="dirichlet", num_clients=5, concentration=concentration, min_records=5)
        means = [np.mean([r.fields["target"] for r in s.train]) for s in partition(config, whole, "target", 1).values()]
        return np.std(means)

    assert spread(0.1) > 5 * spread(1000.0)


def names(config: Config, targets) -> dict[str, list[str]]:
    shards = partition(config, data(300, 60, targets), "target", 1)
    return {name: [r.key for r in shard.train + shard.test] for name, shard in shards.items()}


def test_numbers_that_a_csv_spells_are_skewed_as_numbers_are():
    config = Config(kind="dirichlet", num_clients=5, concentration=0.3)
    numbers = np.linspace(-4, 4, 97).tolist()
    as_numbers = names(config, numbers)
    assert names(config, [UntypedStr(number) for number in numbers]) == as_numbers
    assert names(config, [str(number) for number in numbers]) != as_numbers  # text of a file with types is a label


def test_codes_that_are_not_all_numbers_are_labels():
    config = Config(kind="dirichlet", num_clients=3, concentration=0.5)
    codes = ["250", "250.1", "V45"]
    assert names(config, [UntypedStr(code) for code in codes]) == names(config, codes)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "column_dirichlet"])
def test_the_seed_fixes_all(kind):
    config = Config(kind=kind, num_clients=6, column="domain" if "column" in kind else None)
    assert partition(config, data(), "target", 4) == partition(config, data(), "target", 4)
    assert partition(config, data(), "target", 4) != partition(config, data(), "target", 5)


def test_no_global_random_state_is_used():
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    partition(Config(kind="dirichlet", num_clients=3), data(), "target", 0)
    assert np.random.get_state()[1].tolist() == before


def test_min_records_is_kept_by_drawing_again():
    config = Config(kind="dirichlet", num_clients=5, concentration=0.3, min_records=40)
    for seed in range(5):
        assert min(len(shard.train) for shard in partition(config, data(), "target", seed).values()) >= 40


def refused(config: Config, whole: ClientData) -> str:
    with pytest.raises(DataError) as caught:
        partition(config, whole, "target", 0)
    return str(caught.value)


def test_too_many_clients_are_refused_by_name():
    message = refused(Config(kind="dirichlet", num_clients=30), data(20))
    assert message.startswith("client 'client-")
    assert "gets 0 train records, fewer than min_records = 1" in message
    assert "fewer num_clients, a larger concentration" in message


def test_iid_says_nothing_of_a_concentration():
    message = refused(Config(kind="iid", num_clients=30), data(20))
    assert "set fewer num_clients or a lower min_records" in message


def test_a_value_that_only_the_test_side_has_is_a_client_without_training_records_and_not_divided():
    whole = data()
    whole.test.append(Record("test x", {"domain": "letters", "target": "no"}))
    shards = partition(Config(kind="column", column="domain"), whole, "target", seed=0)
    assert (len(shards["letters"].train), len(shards["letters"].test)) == (0, 1)
    assert "client 'letters" in refused(Config(kind="column_dirichlet", column="domain", num_clients=4), whole)


def test_fewer_clients_than_values():
    message = refused(Config(kind="column_dirichlet", column="domain", num_clients=2), data())
    assert "column 'domain' has 3 values" in message
    assert "set it to 3 or more" in message


@pytest.mark.parametrize("missing", [{}, {"domain": None}, {"domain": " "}, {"domain": float("nan")}])
def test_a_missing_column_value_names_its_record(missing):
    whole = data()
    whole.test[7] = Record("reviews.csv row 17", {"target": "no"} | missing)
    message = refused(Config(kind="column", column="domain"), whole)
    assert "reviews.csv row 17: no value in 'domain'" in message


def test_a_missing_target_names_its_record():
    whole = data()
    whole.train[3] = Record("reviews.csv row 4", {"domain": "tweets"})
    assert "reviews.csv row 4: no value in 'target'" in refused(Config(kind="dirichlet", num_clients=2), whole)


def test_nothing_to_partition():
    assert "no train records" in refused(Config(kind="iid", num_clients=2), ClientData([], [], {}))


@pytest.mark.parametrize("wrong", [
    {"kind": "column"},
    {"kind": "iid"},
    {"kind": "dirichlet"},
    {"kind": "column_dirichlet", "num_clients": 3},
    {"kind": "column_dirichlet", "column": "domain"},
    {"kind": "column", "column": "domain", "num_clients": 3},
    {"kind": "iid", "column": "domain", "num_clients": 3},
    {"kind": "iid", "num_clients": 0},
    {"kind": "iid", "num_clients": 2, "min_records": 0},
    {"kind": "dirichlet", "num_clients": 2, "concentration": 0},
    {"kind": "dirichlet", "num_clients": 2, "concentration": float("nan")},
    {"kind": "random", "num_clients": 2},
    {"kind": "iid", "num_clients": 2, "alpha": 1},
])  # fmt: skip
def test_a_wrong_configuration_is_refused(wrong):
    with pytest.raises(ValidationError):
        Config(**wrong)


def carded(folder, text: str, **more) -> dict[str, ClientData]:
    (folder / "cards.csv").write_text(text)
    config = Config(kind="column", column="domain", cards=str(folder / "cards.csv"), **more)
    return partition(config, data(), "target", 0)


def test_cards_are_handed_out_with_words_and_numbers(tmp_path):
    found = carded(tmp_path, "client,country,beds\ntweets,fr,120\nfilms,de,\n")
    assert found["tweets"].metadata == {"domain": "tweets", "country": "fr", "beds": 120}
    assert found["films"].metadata == {"domain": "films", "country": "de"}
    assert found["products"].metadata == {"domain": "products"}


@pytest.mark.parametrize(("text", "said"), [
    ("client,country\ntweet,fr\n", "client 'tweet'"),
    ("name,country\ntweets,fr\n", "column 'client'"),
    ("client,country\ntweets,fr\ntweets,de\n", "row 2: client 'tweets' has a card already"),
])  # fmt: skip
def test_a_card_of_nobody_or_of_somebody_twice_is_refused(tmp_path, text, said):
    with pytest.raises(DataError, match=said):
        carded(tmp_path, text)


def test_only_what_all_of_a_clients_records_agree_in_is_published():
    whole = data()
    for record in [*whole.train, *whole.test]:
        record.fields["country"] = {"tweets": "fr", "films": "de", "products": "it"}[record.fields["domain"]]
    config = Config(kind="column", column="domain", publish=("country",))
    assert partition(config, whole, "target", 0)["films"].metadata == {"domain": "films", "country": "de"}
    whole.train[3].fields["country"] = "at"
    with pytest.raises(DataError, match=r"partition.publish: client 'tweets' has 'fr' and 'at' \(train 3\)"):
        partition(config, whole, "target", 0)
