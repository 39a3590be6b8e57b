"""peers.py --train: what is run, what a run must have done, what is told, and every tool once."""

import json
import sys

import pytest
from PIL import Image
from rich.console import Console

from benchmarks import peers
from benchmarks.harness import peer_runs, plots, runner, training_plots, training_times
from benchmarks.harness.peer_runs import PACKAGES, TRAINER, Installed
from benchmarks.harness.session import Job, Sample, Session
from benchmarks.harness.statistics import Spread
from benchmarks.harness.training_runs import TOOLS, TUTORIAL, Setting, TrainingRuns, settings
from common.errors import RunError

PEERS = [sys.executable, str(runner.REPOSITORY / "benchmarks" / "peers.py")]


# -------------------------------------------------------------------------------------------------------- what is run


def test_every_launcher_is_run_with_ddp_and_its_fastest_way_and_lower_precisions_with_that():
    titles = [(s.title, s.precision) for s in settings(["spawn", "mpi"], ["trainer", TUTORIAL], 2, 1, ["fp32", "bf16"])]
    assert titles == [
        ("spawn.py", "fp32"),
        ("spawn.py --sync shared_memory", "fp32"),
        ("spawn.py --sync shared_memory, bf16", "bf16"),
        ("mpi.py", "fp32"),
        ("mpi.py --sync mpi", "fp32"),
        ("mpi.py --sync mpi, bf16", "bf16"),
        ("Hugging Face Trainer", "fp32"),
        ("PyTorch's DDP tutorial loop", "fp32"),
    ]
    assert HALF.flags == ("--sync", "shared_memory", "--precision", "bf16", "--channels_last") and DDP.flags == TRAINED.flags == ()


def test_repeats_are_interleaved_and_each_has_its_own_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "find_peers", lambda names: {n: Installed("python", "1") for n in names if n != "fabric"})
    words = [
        "--train",
        "--launchers",
        "spawn",
        "--precisions",
        "fp32",
        "--repeats",
        "2",
        "--epochs",
        "3",
        "--output",
        str(tmp_path),
    ]
    asked = peers.ask(words)
    assert asked.missing == ["fabric"] and asked.world_sizes == [2]
    names = [job.case.title for job in asked.jobs()]
    assert names[:5] == ["spawn.py", "spawn.py --sync shared_memory", TOOLS["trainer"], TOOLS["accelerate"], TOOLS[TUTORIAL]]
    assert names[5:] == names[:5][::-1]
    assert [job.flags[:4] for job in asked.jobs()] == [("--epochs", "3", "--seed", str(r)) for r in (0, 1) for _ in range(5)]


@pytest.mark.parametrize(
    ("setting", "typed"),
    [
        (Setting("spawn", 2, 1, sync=("--sync", "shared_memory")), "launchers/spawn.py --world_size 2 --master_port 0 --epochs 1"),
        (Setting(TUTORIAL, 2, 1), "torchrun --standalone --nproc_per_node=2 benchmarks/tutorial_loop.py --epochs 1"),
        (Setting("trainer", 2, 1), "-m torch.distributed.run --standalone --nproc_per_node=2 trainer_loop.py --threads 1"),
        (Setting("fabric", 2, 1), "fabric_loop.py --world_size 2 --threads 1 --epochs 1"),
    ],
)  # fmt: skip
def test_the_commands_are_what_a_user_types(tmp_path, setting, typed):
    runs = TrainingRuns({name: Installed("/venv/bin/python", "1") for name in TRAINER | PACKAGES})
    start = runs.start(Job(setting, "timed", ("--epochs", "1", *setting.flags)), tmp_path)
    assert typed in start.typed
    assert any((start.cwd / word).is_file() for word in start.words if word.endswith(".py"))


# ---------------------------------------------------------------------------------------------- what a run must have done


def rank_files(folder, **changed):
    for rank in range(2):
        record = {
            "rank": rank, "world_size": 2, "pid": 100 + rank, "host": "here", "threads": 1, "backend": "gloo", "finished": True,
            "first_step_done": 10.0 + rank, "samples_first_step": 32, "training_done": 20.0, "samples": 1438, "steps": 46,
            "waited_seconds": 0.1, "test_accuracy": 0.95, "parameter_sha256": "abc",
        }  # fmt: skip
        (folder / f"rank-{rank}.json").write_text(json.dumps(record | (changed if rank == 0 else {})))


def read(folder, launcher="fabric", epochs=2):
    return TrainingRuns({}).read(Job(Setting(launcher, 2, 1), "timed", ("--epochs", str(epochs))), folder, 4.0)


def test_a_peers_figures_are_its_slowest_ranks(tmp_path):
    rank_files(tmp_path)
    found = read(tmp_path)
    assert (found["launch_seconds"], found["train_seconds"], found["test_accuracy"], found["backend"]) == (7.0, 9.0, 0.95, "gloo")
    assert found["case"] == "Lightning Fabric" and found["samples_per_second"] == (2 * 1438 - 64) / 9


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"world_size": 1}, "asked for world size 2, but rank 0 says 1"),
        ({"threads": 2}, "used 2 threads on rank 0"),
        ({"samples_first_step": 64}, "took 96 samples in the first step"),
        ({"samples": 1300}, "trained 2674 samples after the first step, where 2 epochs have 2810"),
        ({"samples": 1700}, "trained 3074 samples"),
        ({"parameter_sha256": "other"}, "different parameters"),
        ({"test_accuracy": 0.9}, "looked at its own part only"),
        ({"finished": False}, r"did not finish on ranks \[0\]"),
    ],
)
def test_a_peer_that_did_other_work_is_refused(tmp_path, changed, said):
    rank_files(tmp_path, **changed)
    with pytest.raises(RunError, match=said):
        read(tmp_path)


def test_fewer_epochs_than_asked_for_are_seen(tmp_path):
    rank_files(tmp_path)
    with pytest.raises(RunError, match="where 3 epochs have 4247"):
        read(tmp_path, epochs=3)


RESULT = {
    "world_size": 2, "threads_per_rank": 1, "backend": "gloo", "eval_accuracy": [0.9, 0.96], "launch_seconds": 1.0,
    "train_seconds": 2.5, "step_seconds": 2.0, "samples_per_second": 1405.0, "loss_per_step": [1.0] * 46,
}  # fmt: skip


def test_a_launchers_figures_are_of_its_result(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    found = read(tmp_path, "spawn")
    assert (found["test_accuracy"], found["launch_seconds"], found["train_seconds"]) == (0.96, 1.0, 2.5)
    assert found["samples_per_second"] == 2810 / 2.5, "as the peers': by the whole training, evaluations and all"
    assert "loss_per_step" not in found


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"world_size": 1}, "ran with world size 1, not 2"),
        ({"threads_per_rank": 2}, "ran with threads per rank 2, not 1"),
        ({"eval_accuracy": [None]}, "no test accuracy"),
        ({"samples_per_second": None}, "no step after the first"),
        ({"samples_per_second": 700.0}, "trained 1400 samples"),
    ],
)
def test_a_launcher_that_did_other_work_is_refused(tmp_path, changed, said):
    (tmp_path / "result.json").write_text(json.dumps(RESULT | changed))
    with pytest.raises(RunError, match=said):
        read(tmp_path, "spawn")


# ------------------------------------------------------------------------------------------------------- what is told

DDP, FAST, HALF = settings(["spawn"], [], 2, 1, ["fp32", "bf16"])
TRAINED, FABRIC = Setting("trainer", 2, 1), Setting("fabric", 2, 1)
CASES = [DDP, FAST, HALF, TRAINED, FABRIC]


def runs_of(case, walls, accuracy=0.98, waited=0.0):
    """A good run of each repeat, half of it training."""
    return [
        Sample(Job(case, "timed", (), repeat), "…", wall,
               {"backend": "gloo", "launch_seconds": 1.0, "train_seconds": wall / 2, "samples_per_second": 1.0,
                "waited_seconds": waited, "test_accuracy": accuracy})
        for repeat, wall in enumerate(walls)
    ]  # fmt: skip


@pytest.fixture
def session():
    made = Session(Console(width=132, record=True), 60)
    for case, walls in ((DDP, [4.0, 5.0, 6.0]), (FAST, [3.0, 4.0, 5.0]), (TRAINED, [12.0, 12.0, 12.0])):
        made.samples += runs_of(case, walls)
    made.samples += runs_of(HALF, [2.0, 2.0, 2.0], accuracy=0.97)
    return made


@pytest.fixture
def rows(session):
    return training_times.trainings(session, CASES)


def test_ratios_are_of_pairs_and_a_tool_without_runs_has_none(rows):
    ddp, fast, half, trained, fabric = rows
    assert ddp.times == {"trainer": Spread(12 / 5, 2.0, 3.0, 3)} and fast.times["trainer"].median == 3.0
    assert half.training_times["trainer"] == Spread(6.0, 6.0, 6.0, 3)
    assert trained.times == {} and fabric.figures["wall_seconds"] is None and fabric.backend is None
    assert fast.figures["leave_seconds"] == Spread(1.0, 0.5, 1.5, 3) and fast.backend == "gloo"
    json.dumps([row.as_json() for row in rows])


def test_what_a_script_waits_is_not_counted_against_its_tool(session):
    session.samples += runs_of(FABRIC, [9.0], waited=0.5)
    fabric = training_times.trainings(session, CASES)[-1]
    assert fabric.figures["wall_seconds"].median == 8.5 and fabric.figures["leave_seconds"].median == 3.0


def test_only_repeats_that_both_have_are_compared(session):
    session.samples = [s for s in session.samples if (s.job.case, s.job.repeat) != (TRAINED, 0)]
    fast = training_times.trainings(session, CASES)[1]
    assert fast.times["trainer"] == Spread(2.7, 2.4, 3.0, 2)


def test_accuracy_is_compared_with_the_tools_and_with_the_same_way_in_float32(rows):
    ddp, fast, half, *_ = rows
    assert set(ddp.points) == set(fast.points) == {"trainer"} and ddp.points["trainer"] == Spread(0, 0, 0, 3)
    assert set(half.points) == {"trainer", "fp32"}
    assert half.points["fp32"].median == pytest.approx(-1.0)


def test_the_sentences_name_our_fastest_and_what_it_loses(rows):
    said = training_times.sentences(rows)
    assert said[0] == (
        "2 ranks: spawn.py --sync shared_memory is 3.00 (2.40–4.00) times as fast as Hugging Face Trainer."
    )  # fmt: skip
    assert "is within 0.5 percentage points" in said[1] and "Hugging Face Trainer +0.00" in said[1]
    assert "shared_memory, bf16 is 6.00 (6.00–6.00) times as fast as Hugging Face Trainer, all in float32." in said[2]
    assert "is NOT within 0.5" in said[3] and "its own float32 -1.00 (-1.00 to -1.00)" in said[3]
    assert len(said) == 4


def test_a_run_that_learnt_less_is_marked(session):
    session.samples += runs_of(FABRIC, [9.0], accuracy=0.89)
    rows = training_times.trainings(session, CASES)
    assert [row.off for row in rows] == [False] * 4 + [True]
    assert training_times.sentences(rows)[-1].startswith(
        "! A run of Lightning Fabric, 2 ranks ended with a test accuracy below 90%"
    )
    assert rows[-1].as_json()["accuracy_is_off"]
    training_times.show(session.console, rows, 2, 1, 10)
    assert "89.0%!" in session.console.export_text()


def test_the_report_shows_all_and_fails_with_a_failed_run(session, rows):
    training_times.show(session.console, rows, cores=1, threads=1, epochs=10)
    assert training_times.tell(session.console, session, rows) is True
    session.samples.append(
        Sample(Job(FABRIC, "timed", ()), "…", 1.0, None, "Lightning Fabric ended with exit status 1\nlast words")
    )
    assert training_times.tell(session.console, session, rows) is False
    text = session.console.export_text()
    for words in ("4.00 (3.00–5.00)", "98.0%", "2.40 (2.00–3.00)", "10 epochs", "2*", "Noisy", "last words", "–"):
        assert words in text, words
    assert max(len(line) for line in text.splitlines()) <= 132


def test_the_picture_is_drawn_without_what_has_no_runs(rows, tmp_path):
    paths = training_plots.whole_trainings(rows, tmp_path, "a machine", 2, 10)
    text = paths[1].read_text()
    assert [p.name for p in paths] == ["training.png", "training.svg"] and "a machine" in text
    with Image.open(paths[0]) as picture:
        assert picture.width > 1000 and len(picture.getcolors(1 << 20) or []) > 10
    assert "Hugging Face Trainer, 98.0%" in text and "Lightning Fabric" not in text


# ------------------------------------------------------------------------------------------------------- every tool


@pytest.mark.launch
@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_trains_on_two_ranks_and_leaves_nothing_behind(name):
    """The session refuses other work than was asked for, and processes left behind."""
    runs = TrainingRuns(peer_runs.find_peers([name]))
    if name != TUTORIAL and name not in runs.peers:
        pytest.skip(peer_runs.missing_in_words(name))
    before = set(peer_runs.SCRIPTS.iterdir())
    session = Session(Console(quiet=True), 100, runs.start, runs.read)
    session.carry_out([Job(Setting(name, 2, 1), "timed", ("--epochs", "2", "--seed", "1"))])
    assert {path.name for path in set(peer_runs.SCRIPTS.iterdir()) - before} <= {"__pycache__"}
    (sample,) = session.samples
    assert not sample.failure, sample.failure
    result = sample.result
    assert result["world_size"] == 2 and result["backend"] == "gloo" and result["test_accuracy"] > 0.85
    assert 0 < result["launch_seconds"] < result["launch_seconds"] + result["train_seconds"] < sample.wall_seconds


@pytest.mark.launch
def test_train_end_to_end(tmp_path):
    tools = ["tutorial", *(["fabric"] if peer_runs.find_peers(["fabric"]) else [])]
    flags = ["--launchers", "spawn", "--peers", *tools, "--precisions", "fp32", "--epochs", "1", "--repeats", "1"]
    outcome = runner.run([*PEERS, "--train", *flags, "--output", str(tmp_path)], 200)
    assert outcome.ok, outcome.tail(40)
    written = json.loads((tmp_path / "training.json").read_text())
    assert written["complete"] and written["machine"]["processor"] and written["versions"]["torch"] and written["commit"]
    assert written["settings"]["epochs"] == 1
    assert [r["case"] for r in written["summary"]] == [
        "spawn.py",
        "spawn.py --sync shared_memory",
        *(TOOLS[n] for n in tools),
    ]
    for row in written["summary"][:2]:
        assert set(row["times_as_fast"]) == set(tools) and row["figures"]["test_accuracy"]["median"] > 0.5
    assert all((tmp_path / f"training{kind}").stat().st_size > 5000 for kind in plots.FORMATS)
    assert "times as fast as" in outcome.stdout and not outcome.stderr
