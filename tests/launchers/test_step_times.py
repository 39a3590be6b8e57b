"""--step_times as a user gives it: the training stays what it is, and the parts are where the time goes."""

import pytest
from running import command, run, trained

from common.steps import KEPT, PARTS

pytestmark = pytest.mark.launch

FLAGS = ("--job", "random", "--data_size", 1000, "--global_batch_size", 10, "--epochs", 3, "--threads", 1)


@pytest.mark.parametrize(
    ("way", "more"),
    [
        *((way, ()) for way in ("ddp", "by_hand", "by_hand_flat", "shared_memory")),
        ("ddp", ("--accumulate", 2)),
        ("ddp", ("--find_unused_parameters",)),
        ("by_hand", ("--accumulate", 2)),
    ],
)
def test_a_timed_run_trains_the_same(tmp_path, way, more):
    results = {}
    for extra in ((), ("--step_times",)):
        flags = (*FLAGS, "--sync", way, "--precision", "fp64", *more, *extra)
        results[extra] = trained(command("spawn", 2, *flags), tmp_path / f"{len(extra)}.json")
    plain, timed = results.values()
    assert timed["loss_per_step"] == pytest.approx(plain["loss_per_step"], rel=1e-9)
    assert plain["step_times"] is None
    found = timed["step_times"]
    probes = way in ("ddp", "shared_memory")
    # Neither the first step is counted nor those that follow a probe.
    assert found["steps"] + 2 * found["probes"] == 3 * 100 - 1 and bool(found["probes"]) == probes
    assert len(found["ranks"]) == 2 and found["raw_steps_kept"] == KEPT
    for rank in found["ranks"]:
        raw, medians = rank["raw"], rank["median"]
        assert all(len(raw[part]) == KEPT for part in (*PARTS, "step"))
        assert ("backward_in_probes" in raw) == probes
        for number, step in enumerate(raw["step"]):  # raw seconds are rounded to 10 ns
            assert sum(raw[part][number] for part in PARTS) == pytest.approx(step, abs=1e-7)
        for part in ("data", "forward", "backward", "optimizer"):
            assert 0 < medians[part] < medians["step"], part
        assert medians["communication"] > 0, "two ranks of a small model: most of a step is communication"
    # The loop's own clock, which has the probes in it and the averaging after them, agrees.
    assert timed["step_seconds"] > found["steps"] * min(min(r["raw"]["step"]) for r in found["ranks"])


def test_a_person_is_told_each_rank():
    ended = run(command("spawn", 2, *FLAGS, "--step_times"))
    assert ended.status == 0, str(ended)
    for rank in (0, 1):
        assert f"Step of rank {rank}, median: " in ended.out
    alone = run(command("plain", 1, *FLAGS, "--step_times"))
    assert alone.status == 0 and alone.out.count("Step of rank") == 1, str(alone)
