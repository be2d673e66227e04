"""A comparison's cells on Ray actors: the figures of worker processes, and what a killed actor costs."""

import stat
from collections.abc import Iterator
from typing import Any

import pytest
from test_compare import FREE, PRIVATE, of, plan, troubled

import rays
from ficpd.errors import ConfigError
from ficpd.experiments.comparison.compare import compare
from ficpd.experiments.comparison.ray_workers import pack, ray_address, unpack
from ficpd.experiments.run_directory import RunDir

pytestmark = rays.NO_WARNINGS


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with rays.two_nodes() as made:
        yield made


def test_a_run_travels_whole_and_its_directory_stays_its_owners(tmp_path):
    (tmp_path / "here" / "run" / "library").mkdir(parents=True)
    (tmp_path / "here" / "other").mkdir()
    (tmp_path / "here" / "run").chmod(0o700)
    (tmp_path / "here" / "run" / "library" / "card.json").write_text("{}")
    (tmp_path / "there" / "run").mkdir(parents=True)
    (tmp_path / "there" / "run" / "old").write_text("of before")
    unpack(pack(tmp_path / "here", "run"), tmp_path / "there")
    assert [str(path.relative_to(tmp_path / "there")) for path in sorted((tmp_path / "there").rglob("*"))] == [
        "run", "run/library", "run/library/card.json",
    ]  # fmt: skip
    assert stat.S_IMODE((tmp_path / "there" / "run").stat().st_mode) == 0o700


def test_another_word_than_ray_is_refused():
    with pytest.raises(ConfigError, match="ray://HOST:PORT"):
        ray_address("raylet")


@pytest.mark.slow
def test_cells_on_two_nodes_are_those_of_worker_processes(cluster, tmp_path):
    axes = "[methods.fedavg]\n[methods.ficpd]\nmethod.num_prototypes = 2\n" + troubled("error").partition("\n")[2]
    here, there = plan(tmp_path / "here", axes + FREE + PRIVATE), plan(tmp_path / "there", axes + FREE + PRIVATE)
    ours = compare(here, tmp_path / "here" / "out", jobs=2)
    events: list[Any] = []
    theirs = compare(there, tmp_path / "there" / "out", jobs="ray", seen=events.append)
    assert theirs.counts == ours.counts
    for one, other in zip(ours.cells, theirs.cells, strict=True):
        assert (one.method, one.budget, one.status, one.data) == (other.method, other.budget, other.status, other.data)
        assert (one.figures, one.epsilon, one.bytes, one.queries) == (
            other.figures, other.epsilon, other.bytes, other.queries,
        )  # fmt: skip
        if other.status == "done":
            assert RunDir(tmp_path / "there" / "out" / "cells" / other.key).result()
    assert {event["status"] for event in events if "status" in event} == {"done", "failed"}
    assert any(event.get("done") == 3 for event in events)
    bad = of(theirs, method="bad")[0]
    assert "Traceback" in (tmp_path / "there" / "out" / "cells" / f"{bad.key}.log").read_text()


@pytest.mark.slow
def test_a_killed_actor_costs_its_run_and_the_next_call_makes_up_for_it(cluster, tmp_path):
    given = plan(tmp_path, troubled("killed", unless=tmp_path / "calm") + FREE, "[0, 1]")
    found = compare(given, tmp_path / "out", jobs="ray")
    bad = of(found, method="bad")
    assert {cell.status for cell in bad} == {"failed"}
    assert all("its actor ended" in str(cell.reason) for cell in bad)
    assert {cell.status for cell in found.cells if cell.method != "bad"} == {"done"}
    (tmp_path / "calm").touch()
    assert compare(given, tmp_path / "out", jobs="ray").counts == {"done": len(found.cells)}
