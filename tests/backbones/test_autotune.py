"""What is fastest here is decided by the least of several times: a machine that is busy for one of them decides nothing."""

import itertools

import torch

from ficpd.backbones import autotune


def clock(monkeypatch, *seconds: float) -> None:
    """Each measured call takes the next of these, over and over."""
    ends = itertools.accumulate(itertools.cycle(seconds))
    times = (time for end, taken in zip(ends, itertools.cycle(seconds)) for time in (end - taken, end))
    monkeypatch.setattr(autotune.time, "perf_counter", times.__next__)


def test_the_least_time_counts_and_the_first_call_does_not(monkeypatch):
    clock(monkeypatch, 5.0, 1.0, 4.0)
    calls = []
    assert autotune.least_seconds(lambda: calls.append(None), 3) == 1.0
    assert len(calls) == 4


def test_one_interruption_does_not_change_the_dtype(monkeypatch):
    float32, bfloat16 = [4.0] * autotune.REPEATS, [1.0] * autotune.REPEATS
    for interrupted in range(autotune.REPEATS):
        slow = [100.0 if place == interrupted else value for place, value in enumerate(bfloat16)]
        clock(monkeypatch, *float32, *slow)
        assert autotune._bf16_pays(torch.device("cpu"))
    clock(monkeypatch, *bfloat16, *float32)
    assert not autotune._bf16_pays(torch.device("cpu"))
