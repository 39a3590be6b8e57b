"""restarts.py: what a restart is made of; ratios; the command line; a whole run."""

import json
import os
import sys

import pytest
from PIL import Image
from rich.console import Console

from benchmarks import restarts as script
from benchmarks.harness import restarts
from benchmarks.harness.cases import Case
from benchmarks.harness.runner import REPOSITORY, run
from benchmarks.harness.session import Job, Sample, Session, Start
from common.errors import RunError, UsageError

FAULT = 100.0
NEW = {"interpreter_up": 100.5, "ranks_known": 100.6, "torch_imported": 101.5, "group_joined": 102.0, "first_step_done": 102.25}


def rank(number, restart=0, **phases):
    return {"rank": number, "restart": restart, "world_size": 2, "pid": 10 + number, "phases": phases}


def test_the_parts_add_up_to_the_slowest_ranks_next_step():
    old = [rank(0, process_ended=100.25, first_step_done=90.0), rank(1, process_ended=100.125)]
    slower = {name: at + 0.5 for name, at in NEW.items()}
    parts = restarts.split(FAULT, old, [rank(0, 1, **slower), rank(1, 1, **NEW)])
    assert parts == {
        "process_ended": 0.25, "interpreter_up": 0.75, "torch_imported": 1.0, "group_joined": 0.5, "first_step_done": 0.25,
    }  # fmt: skip
    assert sum(parts.values()) == slower["first_step_done"] - FAULT


def test_a_watcher_that_hears_of_an_end_late_makes_no_part_negative():
    late = [rank(0, process_ended=100.75), rank(1)]  # of rank 1 it has not heard at all
    parts = restarts.split(FAULT, late, [rank(0, 1, **NEW)])
    assert parts["process_ended"] == 0.5 and parts["interpreter_up"] == 0
    assert sum(parts.values()) == 2.25


def write(folder, number, restart, **phases):
    folder.mkdir(exist_ok=True)
    lines = [{"rank": number, "restart": restart, "pid": 1}, *({"phase": name, "time": at} for name, at in phases.items())]
    name = f"rank-{number}.restart-{restart}.jsonl" if restart else f"rank-{number}.jsonl"
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_ranks_count_once_all_of_the_start_are_there(tmp_path):
    folder = tmp_path / "events"
    assert restarts.ranks_of(folder, 0, 2, "first_step_done") == []
    write(folder, 0, 0, first_step_done=1.0)
    (folder / "rank-1.jsonl").touch()  # has only just been made
    assert restarts.ranks_of(folder, 0, 2, "first_step_done") == []
    write(folder, 1, 1, first_step_done=1.0)  # another start's
    assert restarts.ranks_of(folder, 0, 2, "first_step_done") == []
    write(folder, 1, 0, first_step_done=1.0)
    assert [r["rank"] for r in restarts.ranks_of(folder, 0, 2, "first_step_done")] == [0, 1]
    assert restarts.ranks_of(folder, 0, 2, "group_joined") == []


@pytest.fixture
def session():
    made = Session(Console(width=160, record=True), 60)
    for repeat, slow in enumerate((1.0, 2.0, 1.5)):
        for launcher, factor in (("torchrun", 10), ("elastic", 1)):
            for n in (2, 4):
                parts = {name: slow * factor * n * 0.01 for name in restarts.PARTS}
                result = {"restart_seconds": sum(parts.values()), "part_seconds": parts}
                job = Job(Case(launcher, n, 1), "restart", (), repeat)
                made.samples.append(Sample(job, "python …", 5.0, result))
    return made


CASES = [Case(launcher, n, 1) for n in (2, 4) for launcher in ("torchrun", "elastic")]


def test_ratios_are_of_medians_and_of_pairs(session, tmp_path):
    rows = restarts.summarise(session, CASES)
    assert [row.ratio is None for row in rows] == [True, False, True, False]
    elastic = rows[1]
    assert elastic.seconds.median == pytest.approx(0.15) and elastic.ratio.median == pytest.approx(10)
    assert elastic.paired.samples == 3 and elastic.paired.low == pytest.approx(10)
    assert (
        "10.0 times as fast as torchrun --max_restarts (ratio of medians; within a repeat 10.0 (10.0–10.0))" in elastic.sentence()
    )
    assert elastic.as_json()["ratio_of_medians_to_torchrun"] == pytest.approx(10)
    session.console.print(restarts.tables(rows, 3))
    shown = session.console.export_text()
    assert "import torch" in shown and "0.150 (0.100–0.200)" in shown
    paths = restarts.draw(rows, tmp_path, "caption")
    assert [path.name for path in paths] == ["restarts.png", "restarts.svg"]
    with Image.open(paths[0]) as picture:
        assert picture.size[0] > 800


def test_without_torchrun_nothing_is_claimed(session):
    session.samples = [sample for sample in session.samples if sample.job.case.launcher == "elastic"]
    rows = restarts.summarise(session, CASES)
    assert [row.seconds is None for row in rows] == [True, False, True, False]
    assert rows[1].sentence() == "elastic, 2 ranks: not measured beside torchrun."


def test_a_run_that_ends_too_soon_is_a_failure_with_its_last_words(tmp_path):
    quick = [sys.executable, "-c", "print('that was all')"]
    session = Session(
        Console(file=open(os.devnull, "w")), 60, lambda job, folder: Start(quick, {}, "python -c …"), attend=script.attend
    )
    with session.console.file:
        session.carry_out([Job(Case("elastic", 2, 1), "restart", ())])
    (sample,) = session.samples
    assert sample.result is None and "before all ranks trained\n" in sample.failure and "that was all" in sample.failure


def test_runs_are_interleaved_and_the_order_is_turned_round(tmp_path):
    asked = script.Restarts(["--repeats", "2", "--output", str(tmp_path)])
    names = [job.case.name for job in asked.jobs()]
    assert names[:4] == ["torchrun, 2 ranks", "elastic, 2 ranks", "torchrun, 4 ranks", "elastic, 4 ranks"]
    assert names[4:] == names[3::-1]
    for job in asked.jobs()[:2]:
        words = script.start(job, tmp_path).words
        at = words.index("--max_restarts=1") if job.case.launcher == "torchrun" else words.index("--max_restarts")
        assert (at < next(i for i, word in enumerate(words) if word.endswith(".py"))) == (job.case.launcher == "torchrun")


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--launchers", "mpi"], "--launchers mpi: not allowed"),
        (["--repeats", "0"], "--repeats 0: not allowed"),
        (["--epochs", "3"], "--epochs: restarts.py stops each run itself"),
        (["--events", "here"], "--events: restarts.py sets it itself"),
        (["--threads", "as_shipped"], "--threads as_shipped: restarts.py gives all the same"),
        (["--batch", "3"], "--batch: no such flag"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, flags, told):
    with pytest.raises(UsageError, match=told) as refused:
        script.Restarts([*flags, "--output", str(tmp_path)])
    assert "\n" not in str(refused.value)


@pytest.mark.launch
@pytest.mark.only_on("linux")
def test_a_whole_run(tmp_path):
    words = ["--world_sizes", "2", "--repeats", "1", "--output", str(tmp_path / "out")]
    ended = run([sys.executable, "benchmarks/restarts.py", *words], 100, folder=REPOSITORY)
    assert ended.ok, ended
    told = json.loads((tmp_path / "out/restarts.json").read_text())
    assert told["complete"] and told["machine"]["cores"] and told["versions"]["torch"] and "restarts.py" in told["command"]
    assert [sample["result"]["killed_rank"] for sample in told["samples"]] == [0, 0]
    for sample in told["samples"]:
        assert all(seconds >= 0 for seconds in sample["result"]["part_seconds"].values())
        assert {new["restart"] for new in sample["result"]["new_ranks"]} == {1}
    row = next(row for row in told["summary"] if row["launcher"] == "elastic")
    assert row["part_seconds"]["torch_imported"]["median"] == 0 and row["ratio_of_medians_to_torchrun"] > 1
    assert (tmp_path / "out/restarts.png").exists() and "times as fast as torchrun" in ended.stdout


def test_attend_names_a_rank_that_is_gone_already(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "TRAINS_S", 0)

    def gone(*_):
        raise ProcessLookupError

    monkeypatch.setattr(script.os, "kill", gone)
    for number in (0, 1):
        write(tmp_path / "events", number, 0, first_step_done=1.0)
    with pytest.raises(RunError, match="rank 1 had ended before it was to be killed"):
        script.attend(Job(Case("elastic", 2, 1), "restart", (), 1), tmp_path, None)
