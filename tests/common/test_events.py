"""Each rank's phases as JSON lines: whole whatever happens, complete and in order, on one clock."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from benchmarks.harness import cases
from benchmarks.harness.cases import Case
from benchmarks.harness.runner import Running, run
from common import events, now
from common.events import PHASES, Phases
from common.ports import PortReservation
from common.rank import Rank
from tests.common.helpers import refusal, until

SMALL = ["--job", "random", "--data_size", "256", "--epochs", "1"]
TEN_MS = 0.01  # what the kernel counts a process's start in


# ------------------------------------------------------------------------------------------------- lines and files


def lines(path):
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_marks_are_written_as_they_come_those_before_the_file_too(tmp_path):
    phases = Phases(started=now())
    phases.mark("interpreter_up")
    phases.write_to(str(tmp_path / "new" / "folder"), Rank("plain", 1, 2, 1, 2, master_addr="127.0.0.1"), clock="c")
    phases.mark("torch_imported")
    about, *marks = lines(tmp_path / "new" / "folder" / "rank-1.jsonl")
    assert (about["launcher"], about["rank"], about["world_size"], about["pid"]) == ("plain", 1, 2, os.getpid())
    assert about["clock"] == "c"
    assert [m["phase"] for m in marks] == ["command_started", "interpreter_up", "torch_imported"]
    assert marks[0]["time"] == phases.origin and [m["time"] for m in marks] == sorted(m["time"] for m in marks)


def test_a_restart_gets_a_file_of_its_own(tmp_path):
    for restart in (0, 2):
        Phases(now()).write_to(str(tmp_path), Rank("torchrun", restart=restart))
    assert {p.name for p in tmp_path.iterdir()} == {"rank-0.jsonl", "rank-0.restart-2.jsonl"}
    assert [r["restart"] for r in events.read(tmp_path)] == [0, 2]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert "--events" in refusal(Phases(now()).write_to, str(tmp_path / "file" / "folder"), Rank("plain"))


def test_a_rank_with_another_clock_is_read_on_rank_0s(tmp_path):
    """Its clock is 5000 s ahead; it learns that when it joins, and counts from rank 0's command from then on."""
    started = now()
    own, other = Phases(started), Phases(started + 5000 + 0.25)
    own.write_to(str(tmp_path), Rank("plain", 0, 2, 0, 2, master_addr="127.0.0.1"))
    other.write_to(str(tmp_path), Rank("plain", 1, 2, 1, 2, master_addr="127.0.0.1"))
    other.mark("interpreter_up", started + 5000 + 1)
    other.joined(-5000.0, 0.001, started, 1)
    assert other.marks["interpreter_up"] == pytest.approx(1)
    assert other.mark("first_step_done", started + 5000 + 2) == pytest.approx(2)
    first, second = events.read(tmp_path)
    assert first["clock_offset_seconds"] == 0 and second["clock_offset_seconds"] == -5000
    assert second["seconds"]["command_started"] == pytest.approx(0.25)
    assert second["seconds"]["interpreter_up"] == pytest.approx(1) and second["seconds"]["first_step_done"] == pytest.approx(2)
    assert list(second["seconds"].values()) == sorted(second["seconds"].values())


@pytest.mark.parametrize("told", ["", "elsewhere:1.5", "{clock}:", "{clock}:-1", "{clock}:1e99", "{clock}:{later}", "12"])
def test_a_start_that_another_clock_told_or_that_makes_no_sense_does_not_count(told, monkeypatch):
    monkeypatch.setenv(events.STARTED, told.format(clock=events.clock_id(), later=now() + 60))
    assert events.command_started([]) == pytest.approx(events.started_at(os.getpid()))
    monkeypatch.setenv(events.STARTED, f"{events.clock_id()}:{now() - 3}")
    assert events.command_started([]) == pytest.approx(now() - 3, abs=0.5)


# ------------------------------------------------------------------------------------------------------- real runs


@pytest.mark.launch
@pytest.mark.only_on("linux")
@pytest.mark.parametrize("launcher", (*cases.LAUNCHERS, "elastic"))
def test_all_phases_are_there_and_in_order(launcher, tmp_path):
    words, variables = cases.command(Case(launcher, 2, 1), SMALL)
    result = tmp_path / "result.json"
    outcome = run([*words, "--events", str(tmp_path / "events"), "--result", str(result)], 120, variables)
    assert outcome.ok, outcome.tail(40)
    ranks = events.read(tmp_path / "events")
    assert [r["rank"] for r in ranks] == [0, 1] and {r["launcher"] for r in ranks} == {launcher}
    for rank in ranks:
        seconds = rank["seconds"]
        assert set(seconds) == set(PHASES)
        in_order = [name for name in seconds if name not in ("torch_imported", "ranks_known")]
        assert in_order == [name for name in PHASES if name not in ("torch_imported", "ranks_known")]
        for name in ("torch_imported", "ranks_known"):  # which comes first depends on the launcher
            assert seconds["interpreter_up"] <= seconds[name] <= seconds["group_joined"]
        assert 0 < seconds["interpreter_up"] and seconds["process_ended"] > seconds["group_left"]
        assert seconds["command_started"] == 0 and seconds["process_ended"] < outcome.seconds + 0.5
        assert rank["clock_offset_seconds"] == 0 and rank["threads"] == 1
    told = json.loads(result.read_text())
    assert told["launch_seconds"] == pytest.approx(max(r["seconds"]["first_step_done"] for r in ranks))
    assert told["launch_seconds"] + told["train_seconds"] < outcome.seconds


@pytest.mark.launch
@pytest.mark.only_on("linux")
def test_a_rank_that_is_killed_while_it_trains_leaves_whole_lines(tmp_path):
    words, variables = cases.command(Case("plain", 2, 1), ["--job", "random", "--epochs", "100000"])
    running = Running([*words, "--events", str(tmp_path)], 60, variables)
    try:
        path = tmp_path / "rank-1.jsonl"
        assert until(lambda: path.is_file() and "first_step_done" in path.read_text(), 60)
        os.kill(lines(path)[0]["pid"], signal.SIGKILL)
        outcome = running.wait()
    finally:
        running.kill()
    assert outcome.status == 1 and "Rank 1" in outcome.stderr and "SIGKILL" in outcome.stderr, outcome.tail(40)
    for rank in (0, 1):
        assert len(lines(tmp_path / f"rank-{rank}.jsonl")) > 5
    survivor, killed = events.read(tmp_path)
    for rank in (survivor, killed):
        assert "process_ended" in rank["phases"] and not {"training_done", "group_left"} & rank["phases"].keys()
    assert killed["phases"]["process_ended"] <= survivor["phases"]["process_ended"]


@pytest.mark.launch
@pytest.mark.only_on("linux")
def test_a_rank_in_another_time_namespace_measures_how_far_its_clock_is(tmp_path):
    """What stands for a host with another clock: CLOCK_BOOTTIME there is 5000 s ahead (time_namespaces(7))."""
    ahead = ["unshare", "--fork", "--kill-child", "--time", "--boottime", "5000"]
    if not shutil.which("unshare") or subprocess.run([*ahead, "true"], capture_output=True, timeout=20).returncode:
        pytest.skip("no time namespaces here: they take Linux 5.6 or newer, util-linux' unshare, and root")
    plain = [sys.executable, "launchers/plain.py", *SMALL, "--threads", "1", "--events", str(tmp_path / "events")]
    result = tmp_path / "result.json"
    group = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with PortReservation(0) as port:
        group["MASTER_PORT"] = str(port)
        ranks = [
            Running([*plain, "--result", str(result)], 90, group | {"RANK": "0", "NODE_RANK": "0"}),
            Running([*ahead, *plain], 90, group | {"RANK": "1", "NODE_RANK": "1"}),
        ]
        try:
            outcomes = [rank.wait() for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    assert all(outcome.ok for outcome in outcomes), "\n".join(outcome.tail(40) for outcome in outcomes)
    first, second = events.read(tmp_path / "events")
    assert first["clock"] != second["clock"] and first["clock_offset_seconds"] == 0
    assert 0 < second["round_trip_seconds"] < 1
    error = abs(second["clock_offset_seconds"] + 5000)  # exact in the kernel: both clocks are one, shifted
    assert error <= second["round_trip_seconds"] / 2 + 1e-6
    for rank in (first, second):
        assert set(rank["seconds"]) == set(PHASES)
        assert -TEN_MS <= min(rank["seconds"].values()) and max(rank["seconds"].values()) < outcomes[0].seconds + 5
    # A step ends together everywhere: its all-reduce needs both.
    for name in ("group_joined", "first_step_done", "training_done"):
        assert first["seconds"][name] == pytest.approx(second["seconds"][name], abs=1.0)
    told = json.loads(result.read_text())
    assert told["launch_seconds"] == pytest.approx(max(r["seconds"]["first_step_done"] for r in (first, second)), abs=1e-4)
    assert 0 < told["launch_seconds"] < outcomes[0].seconds and 0 < told["train_seconds"] < outcomes[0].seconds
