"""The harness without launchers: running, judging, counting, drawing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image
from rich.console import Console

from benchmarks import compare
from benchmarks.harness import batch_sizes, cases, machine, mpis, parity, plots, report, statistics, summary
from benchmarks.harness.cases import Case
from benchmarks.harness.runner import MARKER, REPOSITORY, Running, run
from benchmarks.harness.session import Job, Sample, Session
from common import events, now
from common.errors import UsageError

PYTHON = sys.executable


# ------------------------------------------------------------------------------------------------------- running


def gone(pid):
    """Ended, if perhaps not yet reaped by init."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_run_gives_status_output_and_time():
    outcome = run([PYTHON, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"], 20)
    assert (outcome.status, outcome.stdout, outcome.stderr) == (3, "out\n", "err\n")
    assert not outcome.ok and not outcome.timed_out and 0 < outcome.seconds < 20
    assert outcome.tail(1) == "err"


def test_a_signal_is_told_as_a_shell_tells_it():
    outcome = run([PYTHON, "-c", "import os; os.kill(os.getpid(), 9)"], 20)
    assert outcome.status == 128 + signal.SIGKILL


def test_a_run_over_its_limit_is_ended_with_children_in_sessions_of_their_own(tmp_path):
    pids = tmp_path / "pids"
    child = f"import os, time; open({str(pids)!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(60)"
    parent = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True); time.sleep(60)"
    )
    began = time.monotonic()
    outcome = run([PYTHON, "-c", parent], 3)
    assert outcome.timed_out and not outcome.ok
    assert time.monotonic() - began < 10
    (pid,) = pids.read_text().split()
    assert gone(int(pid))


def test_what_a_command_leaves_behind_is_named_and_ended(tmp_path):
    orphan = "import time; time.sleep(60)"
    parent = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {orphan!r}], start_new_session=True).pid)"
    outcome = run([PYTHON, "-c", parent], 20)
    assert outcome.status == 0 and not outcome.ok
    assert len(outcome.left_behind) == 1 and orphan in outcome.left_behind[0]
    assert gone(int(outcome.stdout))


def test_a_run_that_is_interrupted_is_ended(tmp_path):
    running = Running([PYTHON, "-c", "import time; time.sleep(60)"], 60)
    pid = running._process.pid
    running.kill()
    assert gone(pid)
    assert running.wait().status == 128 + signal.SIGKILL


def test_two_runs_have_different_marks():
    code = f"import os; print(os.environ[{MARKER!r}])"
    assert run([PYTHON, "-c", code], 20).stdout != run([PYTHON, "-c", code], 20).stdout


def test_a_run_is_told_when_it_was_started_and_what_it_must_not_see():
    before = now()
    code = f"import os; print(os.environ[{events.STARTED!r}], os.environ.get('GIVEN'), 'TAKEN' in os.environ)"
    os.environ["TAKEN"] = "1"
    try:
        told, given, taken = run([PYTHON, "-c", code], 20, {"GIVEN": "yes", "TAKEN": None}).stdout.split()
    finally:
        del os.environ["TAKEN"]
    clock, _, seconds = told.rpartition(":")
    assert clock == events.clock_id() and before <= float(seconds) <= now()
    assert (given, taken) == ("yes", "False")


# ------------------------------------------------------------------------------------------------------- counting


def test_spread_is_median_and_range():
    s = statistics.spread([3.0, None, 1.0, 2.0])
    assert s == statistics.Spread(2.0, 1.0, 3.0, 3)
    assert s.noisy and not statistics.Spread(10, 9.5, 10.5, 3).noisy
    assert statistics.spread([None]) is None
    assert statistics.Spread(2.0, 1.0, 3.0, 3).text() == "2.00 (1.00–3.00)"
    assert statistics.Spread(2.0, 2.0, 2.0, 1).text() == "2.00"


def test_ratios_pair_the_repeats():
    # The machine was twice as slow in repeat 1; the ratio does not see it.
    assert statistics.paired_ratio({0: 4.0, 1: 8.0, 2: 9.0}, {0: 2.0, 1: 4.0}) == statistics.Spread(2.0, 2.0, 2.0, 2)
    assert statistics.paired_ratio({0: 1.0}, {1: 1.0}) is None


# -------------------------------------------------------------------------------------------------------- judging


def result(curve, **more):
    return {"loss_per_step": curve, "batch_dependent_layers": [], "sampler": "exact", "precision": "fp32"} | more


def test_parity_holds_within_both_limits():
    one = [1.0, 0.5]
    good = parity.judge(result([1.0, 0.5 * (1 + 5e-10)]), result(one), result([1.0 + 9e-6, 0.5]), result(one))
    assert good.holds is True and good.verdict() == "same"


@pytest.mark.parametrize(
    ("fp64", "fp32"),
    [([1.0, 0.5 * (1 + 2e-9)], [1.0, 0.5]), ([1.0, 0.5], [1.0 + 2e-5, 0.5]), ([1.0], [1.0, 0.5])],
)
def test_parity_breaks_where_one_limit_does(fp64, fp32):
    one = [1.0, 0.5]
    bad = parity.judge(result(fp64), result(one), result(fp32), result(one))
    assert bad.holds is False and bad.verdict() == "BROKEN"


def test_a_loss_that_diverged_is_compared_too():
    assert parity.relative_differences([1.0, None, None, 2.0], [1.0, None, 2.0, None]) == [0, 0, float("inf"), float("inf")]


def test_only_the_first_twenty_float32_steps_count():
    one, off = [1.0] * 30, [1.0] * 20 + [2.0] * 10
    assert parity.judge(result(one), result(one), result(off), result(one)).holds is True
    off = [1.0] * 19 + [2.0]
    assert parity.judge(result(one), result(one), result(off), result(one)).holds is False


def test_what_is_not_promised_says_why():
    for more, word in (
        ({"batch_dependent_layers": ["BatchNorm2d"]}, "BatchNorm2d"),
        ({"sampler": "distributed"}, "pads"),
        ({"sampler": "uneven"}, "uneven"),
        ({"compress": "powersgd"}, "--compress powersgd"),
    ):
        verdict = parity.judge(result([1.0], **more), result([2.0]), None, None)
        assert verdict.holds is None and word in verdict.verdict() and verdict.verdict().startswith("not promised: ")
        assert verdict.fp64 == 0.5  # measured all the same
    assert parity.judge(result([1.0, 2.0], sampler="uneven"), result([2.0]), None, None).fp64 is None  # not step by step
    alone = result([1.0], compress="int8", world_size=1)
    assert parity.judge(alone, alone, None, None).holds is True  # one rank sends nothing


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_no_broken_promise_but_a_number(precision):
    one = result([1.0, 0.5])
    lossy = parity.judge(one, one, result([1.0, 0.51], precision=precision), result([1.0, 0.5], precision=precision))
    assert lossy.verdict() == f"not promised: {precision} rounds"
    assert lossy.as_json() == {
        "fp64_difference": 0.0, "fp32_difference": pytest.approx(0.02), "holds": None, "verdict": lossy.verdict()
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- the comparison


def sample(launcher, n, role, repeat, wall, train, curve=(1.0, 0.5), threads=1, digest="abc", **more):
    job = Job(Case(launcher, n, threads), role, (), repeat, more.pop("label", role))
    content = result(list(curve)) | {
        "launch_seconds": wall - train - 0.5,
        "train_seconds": train,
        "samples_per_second": 100 / train,
        "peak_memory_bytes": 2**28,
        "train_loss_per_epoch": [1.0, 0.7],
        "eval_loss_per_epoch": [1.0, 0.8],
        "eval_accuracy": [0.5, 0.9],
        "epoch_end_seconds": [train / 2, train],
        "learning_rate": 0.1,
        "parameter_sha256": digest,
    }
    return Sample(job, f"python launchers/{launcher}.py", wall, content | more)


@pytest.fixture
def session():
    s = Session(Console(width=132, record=True), 60)
    for repeat in range(3):
        s.samples += [
            sample("plain", 1, "timed", repeat, 6.0, 4.0),
            sample("plain", 1, "baseline", repeat, 5.0, 3.0, threads=2),
            sample("mpi", 2, "timed", repeat, 4.0 + repeat, 2.0),
        ]
    s.samples += [
        sample("plain", 1, "fp64 reference", 0, 5, 1),
        sample("plain", 1, "fp64", 0, 5, 1),
        sample("mpi", 2, "fp64", 0, 5, 1),
        sample("plain", 1, "control", 0, 5, 1, curve=(1.0, 0.500001), label="control in 2"),
    ]
    return s


CASES = [Case("plain", 1, 1), Case("mpi", 2, 1)]


def test_speedup_and_efficiency_against_both_baselines(session):
    one, two = summary.summarise(session, CASES, 1, 2, weak=False)
    assert one.speedup["train_seconds/one_rank"].median == 1
    assert two.speedup["train_seconds/one_rank"].median == 2 and two.efficiency.median == 1
    assert two.speedup["train_seconds/all_threads"].median == 1.5
    assert two.speedup["wall_seconds/one_rank"] == statistics.Spread(6 / 5, 1.0, 1.5, 3)
    assert two.figures["leave_seconds"].median == pytest.approx(0.5)
    assert two.parity.holds and summary.noisy([two]) == ["mpi, 2 ranks"] and summary.noisy([one]) == []


def test_a_start_method_is_part_of_the_rows_name(session):
    session.samples.append(sample("spawn", 2, "timed", 0, 5, 2, start_method="forkserver"))
    plain, spawn = summary.summarise(session, [CASES[0], Case("spawn", 2, 1)], 1, 2, weak=False)
    assert (plain.name, spawn.name) == ("plain", "spawn (forkserver)")
    assert spawn.as_json()["start_method"] == "forkserver"


def test_an_mpi_is_known_by_what_it_tells(tmp_path):
    for told, name, version in (
        ("HYDRA build details:\n    Version:   5.0.2", "MPICH", "5.0.2"),
        ("mpirun (Open MPI) 4.1.4", "Open MPI", "4.1.4"),
        ("prterun (PRTE) 3.0.1", "Open MPI", "3.0.1"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9 Build", "Intel MPI", "2021.9"),
    ):
        program = tmp_path / name / version
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ncat <<END\n{told}\nEND\n")
        program.chmod(0o755)
        assert mpis._told(str(program)) == (name, version)
    assert mpis.default().name in mpis.found()
    with pytest.raises(UsageError, match="there is no Quadrics here: install it"):
        mpis.named("Quadrics")


def test_weak_scaling_counts_the_work(session):
    session.samples += [sample("plain", 1, "fp64 reference", 0, 5, 1, label="float64 reference for 2")]
    _, two = summary.summarise(session, CASES, 1, 2, weak=True)
    assert two.speedup["train_seconds/one_rank"].median == 4 and two.efficiency.median == 2


def test_parameters_that_differ_between_launchers_are_seen(session):
    for repeat in range(3):
        session.samples.append(sample("torchrun", 2, "timed", repeat, 5, 2))
    both = [*CASES, Case("torchrun", 2, 1)]
    assert summary.same_to_the_bit(summary.summarise(session, both, 1, 2, False)) == {2: True}
    session.samples[-1].result["parameter_sha256"] = "other"
    assert summary.same_to_the_bit(summary.summarise(session, both, 1, 2, False)) == {2: False}


def test_the_report_says_what_is_wrong(session):
    rows = summary.summarise(session, CASES, 1, 2, weak=False)
    report.show(session.console, rows, 2, 1, weak=False)
    assert report.verdicts(session.console, session, rows) is True
    session.samples.append(
        Sample(Job(CASES[1], "timed", ()), "mpirun …", 1.0, None, "mpi, 2 ranks ended with exit status 1\nlast words")
    )
    assert report.verdicts(session.console, session, rows) is False
    text = session.console.export_text()
    for words in ("strong scaling", "2.00 (2.00–2.00)", "Same loss", "Noisy", "FAILED", "last words"):
        assert words in text, words
    assert max(len(line) for line in text.splitlines()) <= 132


def test_every_picture_is_drawn(session, tmp_path):
    rows = summary.summarise(session, CASES, 1, 2, weak=False)
    paths = plots.speedup(rows, tmp_path, "a machine", 2, 1, weak=False)
    paths += plots.wall_clock(rows, tmp_path, "a machine")
    paths += plots.loss(session, rows, tmp_path, "a machine", 1, weak=False)
    session.samples += [sample("mpi", 2, "batch", r, 5, 2, label=f"batch size {b}") for r in range(2) for b in (16, 32)]
    points = batch_sizes.points(session, target=0.85)
    assert [p["batch_size"] for p in points] == [16, 32] and points[0]["seconds_to_target"].median == 2
    assert batch_sizes.points(session, target=0.95)[0]["seconds_to_target"] is None
    paths += plots.batch_sizes(points, tmp_path, "a machine", 0.85, "none")
    assert {p.name for p in paths} == {
        f"{n}{k}" for n in ("speedup", "wall_clock", "loss", "batch_sizes") for k in (".png", ".svg")
    }
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert picture.width > 1000 and len(picture.getcolors(1 << 20) or []) > 10
        else:
            assert "a machine" in path.read_text() and path.stat().st_size > 5000


# ----------------------------------------------------------------------------------------------- the command line


def test_the_cases_are_what_a_user_types():
    words, _ = cases.command(Case("spawn", 2, 1), ["--epochs", "3"])
    assert cases.shown(words) == "python launchers/spawn.py --world_size 2 --master_port 0 --epochs 3 --threads 1".replace(
        "python", Path(PYTHON).name
    )
    words, _ = cases.command(Case("torchrun", 2, 1), [])
    assert cases.shown(words) == "torchrun --standalone --nproc_per_node=2 launchers/torchrun.py --threads 1"
    words, _ = cases.command(Case("spawn", 2, 1, "fork"), [])
    assert cases.shown(words).endswith("launchers/spawn.py --world_size 2 --master_port 0 --start_method fork --threads 1")
    words, _ = cases.command(Case("mpi", 4, 1), [])
    assert words[1:3] == ["-np", "4"] and str(REPOSITORY / "launchers/mpi.py") in words, "from any folder"


def test_the_plan_interleaves_and_has_both_baselines(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    asked = compare.Comparison(["--world-sizes", "1", "2", "--repeats", "2", "--no_prediction", "--output", str(tmp_path)])
    jobs = asked.timed()
    first = [j.case for j in jobs[: len(jobs) // 2]]
    assert {(c.launcher, c.world_size) for c in first} == {(n, w) for n in cases.LAUNCHERS for w in (1, 2)}
    assert [j.repeat for j in jobs] == sorted(j.repeat for j in jobs)
    assert sum(j.role == "baseline" and j.case == Case("plain", 1, 2) for j in jobs) == 2
    assert all("--global_batch_size" not in j.flags for j in jobs)
    roles = [j.role for j in asked.untimed()]
    assert roles.count("fp64") == 8 and roles.count("fp64 reference") == 1 and roles.count("control") == 1


def test_weak_scaling_keeps_each_ranks_work(tmp_path):
    arguments = ["--scaling", "weak", "--world_sizes", "1", "2", "--batch_size", "16", "--epochs", "3", "--output", str(tmp_path)]
    asked = compare.Comparison(arguments)
    assert asked.at(2).epochs == 6 and asked.at(2).global_batch(2) == 32
    references = [j for j in asked.untimed() if j.role == "fp64 reference"]
    assert [j.flags[j.flags.index("--global_batch_size") + 1] for j in references] == ["16", "32"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--launchers", "mp"], "--launchers mp"),
        (["--world_sizes", "0"], "--world_sizes 0"),
        (["--repeats", "none"], "--repeats none"),
        (["--scaling", "big"], "--scaling big"),
        (["--epoch", "3"], "did you mean --epochs"),
        (["--epochs", "-1"], "--epochs -1"),
        (["--result", "x.json"], "compare.py sets it itself"),
        (["--batch_size", "8"], "give --global_batch_size"),
        (["--scaling", "weak", "--global_batch_size", "8"], "give --batch_size"),
        (["--global_batch_size", "5000"], "larger than the data"),
        (["--batch_sizes", "8", "--batch_size", "8"], "leave these out"),
        (["--output", "/proc/nowhere"], "--output /proc/nowhere"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, said):
    with pytest.raises(UsageError) as refused:
        compare.Comparison(arguments)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_the_machine_is_described_and_the_commit_is_the_checkouts():
    about = machine.describe()
    assert about["cores"] == len(os.sched_getaffinity(0)) and about["memory_gib"] > 0.5 and about["processor"]
    assert machine.versions()["torch"].startswith("2.")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, timeout=10, check=True)
    assert machine.commit().removesuffix("+changes") == head.stdout.strip()
    json.dumps([about, machine.versions()])
