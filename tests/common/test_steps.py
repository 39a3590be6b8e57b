"""--step_times without ranks: parts that add up, probes, what a result file gets."""

import time

import pytest
import torch

from common import steps
from common.command_line import parse_config
from common.gradients import Alone, Way
from common.process_group import Group
from common.rank import Rank
from common.steps import PARTS, PROBE_EVERY, StepTimes, Untimed, step_times
from tests.common.helpers import refusal

MODEL = torch.nn.Linear(1, 1)


@pytest.fixture(autouse=True)
def nothing_is_sent(monkeypatch):
    """There is no process group here: setting up an all-reduce by hand sends rank 0's parameters around."""
    monkeypatch.setattr(steps, "ByHandFlat", lambda model, group: Alone(model))


def group(world_size=1):
    return Group(Rank("plain", 0, world_size, 0, world_size, master_addr="127.0.0.1"), torch.device("cpu"))


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where a test says so."""
    at = [100.0]
    monkeypatch.setattr(steps, "perf_counter", lambda: at[0])

    def passes(seconds):
        at[0] += seconds

    return passes


def one_step(times, clock, **seconds):
    for part, lasts in seconds.items():
        clock(lasts)
        times.mark(part)


def test_it_is_off_unless_asked_for():
    config = parse_config("test.py", argv=[], environment={})
    off = step_times(config, group(), Way("ddp"), MODEL)
    shares, gradients = iter([1]), Alone(MODEL)
    assert type(off) is Untimed and off.steps(shares) is shares and off.averaging(gradients) is gradients
    assert off.gathered() is None and not off.probing
    asked = step_times(parse_config("test.py", argv=["--step_times"], environment={}), group(), Way("ddp"), MODEL)
    assert isinstance(asked, StepTimes)


def test_parts_get_the_time_before_their_mark_and_add_up_to_the_step(clock):
    times = StepTimes(group(), Way("by_hand"), MODEL)

    def sampler():
        for _ in range(4):
            clock(1.0)  # to find the indices
            yield []

    for _ in times.steps(sampler()):
        one_step(times, clock, optimizer=0.5, data=2.0, forward=3.0, backward=4.0, rest=0.25, communication=5.0)
        one_step(times, clock, optimizer=6.0)
        clock(0.125)  # the loop's end
    want = {"data": 3.0, "forward": 3.0, "backward": 4.0, "communication": 5.0, "optimizer": 6.5, "rest": 0.375, "step": 21.875}
    assert len(times.rows) == 3, "the first step belongs to the launch"
    told = times.gathered()
    assert told["ranks"] == [{"median": want, "raw": {name: [value] * 3 for name, value in want.items()}}]
    assert sum(want[part] for part in PARTS) == want["step"]
    assert (told["steps"], told["probes"], told["raw_steps_kept"]) == (3, 0, 3)


def test_parts_of_real_time_add_up_to_the_step():
    times = StepTimes(group(), Way("by_hand"), MODEL)
    began = time.perf_counter()
    for _ in times.steps([None] * 20):
        for part in PARTS:
            time.sleep(0.0002)
            times.mark(part)
    whole = time.perf_counter() - began
    sums, each = [sum(row[:-1]) for row in times.rows], [row[-1] for row in times.rows]
    assert sums == pytest.approx(each, abs=1e-9)
    assert sum(each) < whole < sum(each) * 20 / 19 + 0.05


def test_what_backward_does_not_hide_is_told_by_probes(clock):
    times = StepTimes(group(2), Way("ddp"), MODEL)
    probing = []
    for _ in times.steps(range(2 * PROBE_EVERY)):
        probing.append(times.probing)
        assert times.averaging(gradients := Alone(MODEL)) is (times.by_hand if times.probing else gradients)
        one_step(times, clock, forward=1.0, backward=2.0 if times.probing else 5.0, communication=0.5)
    assert probing == ([False] * (PROBE_EVERY - 1) + [True]) * 2, "never one of the first two: DDP is set up in them"
    # Not counted: the first, the probes, and the one between that follows a probe.
    assert times.unsynced == [2.0, 2.0] and len(times.rows) == 2 * PROBE_EVERY - 4
    medians = dict(zip((*PARTS, "step"), times.medians(), strict=True))
    assert (medians["backward"], medians["communication"], medians["step"]) == (2.0, 3.5, 6.5)
    assert sum(medians[part] for part in PARTS) == medians["step"]


@pytest.mark.parametrize(("way", "ranks"), [("by_hand", 2), ("by_hand_flat", 2), ("ddp", 1)])
def test_no_probes_where_nothing_is_sent_within_backward(way, ranks):
    times = StepTimes(group(ranks), Way(way), MODEL)
    assert not times.probes and not times.by_hand
    for _ in times.steps(range(2 * PROBE_EVERY)):
        assert not times.probing and times.averaging(gradients := Alone(MODEL)) is gradients


def test_too_few_steps_to_tell(clock):
    times = StepTimes(group(), Way("ddp"), MODEL)
    for _ in times.steps([None]):
        times.mark("forward")
    assert times.gathered()["ranks"][0]["median"] is None
    assert "too few steps" in steps.told(times.gathered())


def test_raw_steps_are_limited_and_medians_are_over_all(clock, monkeypatch):
    monkeypatch.setattr(steps, "KEPT", 3)
    times = StepTimes(group(), Way("ddp"), MODEL)
    for number, _ in enumerate(times.steps([None] * 8)):
        one_step(times, clock, forward=float(number))
    told = times.gathered()
    assert told["ranks"][0]["raw"]["forward"] == [5.0, 6.0, 7.0] and told["raw_steps_kept"] == 3
    assert told["steps"] == 7 and told["ranks"][0]["median"]["forward"] == 4.0
    assert "Step of rank 0, median: 4000.000 ms (data 0.000, forward 4000.000" in steps.told(told)


def test_ranks_with_different_numbers_of_steps_are_refused():
    said = refusal(parse_config, "test.py", argv=["--step_times", "--sampler", "uneven"], environment={})
    assert "--step_times with --sampler uneven" in said
