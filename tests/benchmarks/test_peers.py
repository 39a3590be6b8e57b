"""peers.py: what it counts and refuses, and every script under its own launcher, once, with two ranks."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from rich.console import Console

from benchmarks import peers
from benchmarks.harness import launch_times, peer_runs, plots, runner
from benchmarks.harness.cases import Case
from benchmarks.harness.peer_runs import BARE, BY_HAND, PACKAGES, TRAINER, Installed, PeerRuns
from benchmarks.harness.session import Job, Sample, Session
from benchmarks.harness.statistics import Spread
from common.errors import RunError, UsageError

PEERS = [sys.executable, str(runner.REPOSITORY / "benchmarks" / "peers.py")]


# -------------------------------------------------------------------------------------------------------- who is there


def test_a_peer_is_found_beside_this_python_or_in_its_own_environment(monkeypatch, tmp_path):
    own = tmp_path / "python"
    own.touch()
    monkeypatch.setattr(peer_runs, "ENVIRONMENT", own)
    there = {sys.executable: {"accelerate": "1"}, str(own): {"accelerate": "2", "ray": "3"}}
    monkeypatch.setattr(peer_runs, "_versions", there.__getitem__)
    found = peer_runs.find_peers(["ray", "accelerate", "torchrunx"])
    assert found == {"ray": Installed(str(own), "3"), "accelerate": Installed(sys.executable, "1")}


def test_versions_are_asked_of_the_environment_itself():
    assert set(peer_runs._versions(sys.executable)) <= set(PACKAGES | TRAINER)


@pytest.mark.parametrize(("arguments", "status"), [(["--peers", "ray"], 1), ([], 0)])
def test_a_missing_peer_is_named_and_the_run_goes_on(monkeypatch, capsys, tmp_path, arguments, status):
    monkeypatch.setattr(peers, "find_peers", lambda names: {})
    monkeypatch.setattr(sys, "argv", ["peers.py", *arguments, "--output", str(tmp_path)])
    monkeypatch.setattr(Session, "carry_out", lambda self, jobs: self.samples.extend(timed({"plain": [2.0]})))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert peers.main() == status
    said = capsys.readouterr().out
    assert "ray is not installed and was not measured: pip install -r benchmarks/requirements-peers.txt" in said
    written = json.loads((tmp_path / "peers.json").read_text())
    assert "ray" in written["settings"]["missing_peers"] and written["settings"]["peers"] == []


# ---------------------------------------------------------------------------------------------- what a run must have left


def rank_files(folder, n, **changed):
    for rank in range(n):
        record = {
            "rank": rank,
            "world_size": n,
            "pid": 100 + rank,
            "host": "here",
            "threads": 1,
            "first_step_done": 10.0 + rank,
            "loss_sum_first_step": 2.0 * 64 / n,
            "samples_first_step": 64 // n,
            "finished": True,
        }
        (folder / f"rank-{rank}.json").write_text(json.dumps(record | (changed if rank == 0 else {})))


def read(folder, world_size=2, reference=2.0, started=4.0):
    case = Case("bare torchrun", world_size, 1)
    return PeerRuns({}, {False: reference}).read(Job(case, "timed", ()), folder, started)


def test_the_launch_time_is_the_slowest_ranks_and_the_loss_the_whole_batchs(tmp_path):
    rank_files(tmp_path, 2)
    result = read(tmp_path)
    assert result["launch_seconds"] == 7.0 and result["first_step_loss"] == 2.0 and result["world_size"] == 2
    assert [r["rank"] for r in result["ranks"]] == [0, 1]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"world_size": 1}, "asked for world size 2, but rank 0 says 1"),
        ({"rank": 1}, r"ranks \[1, 1\]"),
        ({"pid": 101}, "2 processes were asked for"),
        ({"finished": False}, r"did not finish on ranks \[0\]"),
        ({"threads": 2}, "used 2 threads on rank 0, not 1"),
        ({"samples_first_step": 64}, "took 96 samples"),
        ({"loss_sum_first_step": 64.1}, "one process has 2.0"),
    ],
)
def test_a_run_that_is_not_what_was_asked_for_is_refused(tmp_path, changed, said):
    rank_files(tmp_path, 2, **changed)
    with pytest.raises(RunError, match=said):
        read(tmp_path)


def test_missing_and_surplus_ranks_are_refused(tmp_path):
    with pytest.raises(RunError, match=r"ranks \[\]"):
        read(tmp_path)
    rank_files(tmp_path, 4)
    with pytest.raises(RunError, match="says 4"):
        read(tmp_path)


def test_the_losses_limit_is_relative_and_no_number_is_refused(tmp_path):
    rank_files(tmp_path, 2)
    assert read(tmp_path, reference=2.0 * (1 + 0.9e-4))
    for reference in (2.0 * (1 + 1.1e-4), float("nan")):
        with pytest.raises(RunError, match="after the first step"):
            read(tmp_path, reference=reference)


def test_the_reference_is_kept_for_the_others(tmp_path):
    rank_files(tmp_path, 1)
    runs = PeerRuns({})
    runs.read(Job(Case("bare plain", 1, 1), "reference", ()), tmp_path, 0.0)
    assert runs.reference == {False: 2.0}


# ------------------------------------------------------------------------------------------------------ what is typed


def start(name, world_size, tmp_path):
    found = {name: Installed("/venv/bin/python", "1") for name in PACKAGES}
    return PeerRuns(found).start(Job(Case(name, world_size, 1), "timed", ()), tmp_path)


def test_the_cases_are_what_a_user_types(tmp_path):
    two = start("accelerate", 2, tmp_path)
    assert two.typed == (
        "ACCELERATE_USE_CPU=true /venv/bin/accelerate launch --multi_gpu --num_processes 2 --main_process_port 0 "
        "accelerate_loop.py --threads 1"
    )
    assert two.variables["ACCELERATE_USE_CPU"] == "true" and two.variables["LAUNCHLAB_PEER_OUTPUT"] == str(tmp_path)
    assert "--multi_gpu" not in start("accelerate", 1, tmp_path).words
    assert start("bare torchrun", 2, tmp_path).typed == "torchrun --standalone --nproc_per_node=2 bare_env.py --threads 1"
    assert "bare_env.py" in start("bare plain", 1, tmp_path).words and "bare_plain.py" in start("bare plain", 2, tmp_path).words
    assert start("bare fork", 2, tmp_path).words[-3:-2] == ["fork"]
    assert start("ray", 2, tmp_path).words[1:4] == ["ray_loop.py", "--world_size", "2"]
    assert start("plain", 2, tmp_path).words[1].endswith("/launchers/plain.py")
    for name in (*BY_HAND, *PACKAGES):
        one = start(name, 2, tmp_path)
        assert any((one.cwd / word).is_file() for word in one.words if word.endswith(".py")), name


def test_no_token_of_ray_is_written_into_the_result(tmp_path):
    one = start("ray", 2, tmp_path)
    assert one.variables["RAY_AUTH_TOKEN"] not in one.typed
    assert one.variables["RAY_AUTH_TOKEN"] != start("ray", 2, tmp_path).variables["RAY_AUTH_TOKEN"]


def test_a_pair_is_measured_side_by_side_and_the_order_is_turned_round(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "find_peers", lambda names: {n: Installed("python", "1") for n in names})
    asked = peers.ask(["--world-sizes", "2", "1", "--repeats", "2", "--peers", "ray", "bare_fork", "--output", str(tmp_path)])
    jobs = asked.jobs()
    assert [(j.case.name, j.role) for j in jobs[:2]] == [("plain, 1 rank", "reference"), ("bare plain, 1 rank", "reference")]
    names = [
        "plain",
        "bare plain",
        "spawn",
        "bare spawn",
        "torchrun",
        "bare torchrun",
        "mpi",
        "bare mpi",
        "elastic",
        "bare fork",
        "ray",
    ]
    first = [(j.case.launcher, j.case.world_size) for j in jobs[2:] if j.repeat == 0]
    assert first == [(name, n) for n in (1, 2) for name in names]
    assert [(j.case.launcher, j.case.world_size) for j in jobs[2:] if j.repeat == 1] == first[::-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peers", "horovod"], "--peers horovod"),
        (["--launchers", "bare_plain"], "--launchers bare_plain"),
        (["--world_sizes", "3"], "--world_sizes 3: does not divide the global batch of 64; give some of 1, 2, 4, 8"),
        (["--world_sizes", "0"], "--world_sizes 0"),
        (["--repeats", "0"], "--repeats 0"),
        (["--threads", "x"], "--threads x"),
        (["--time_limit", "-1"], "--time_limit -1"),
        (["--steps", "3"], "--steps 3; see --help"),
        (["--epochs", "3"], "--epochs without --train"),
        (["--precisions", "bf16"], "--precisions without --train"),
        (["--train", "--epochs", "0"], "--epochs 0"),
        (["--train", "--precisions", "fp7"], "--precisions fp7"),
        (["--train", "--peers", "ray"], "--peers ray: not allowed; give one of trainer, accelerate, fabric, tutorial"),
        (["--output", "/proc/nowhere"], "--output /proc/nowhere"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, said):
    with pytest.raises(UsageError) as refused:
        peers.ask(arguments)
    assert said in str(refused.value) and "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------------------------- what is told


def timed(seconds, world_size=2):
    """A good run each of ``{case: [launch time of repeat 0, of repeat 1, …]}``."""
    return [
        Sample(Job(Case(name, world_size, 1), "timed", (), repeat), "…", value + 1, {"launch_seconds": value})
        for name, values in seconds.items()
        for repeat, value in enumerate(values)
    ]


@pytest.fixture
def session():
    made = Session(Console(width=132, record=True), 60)
    made.samples += timed(
        {
            "spawn": [2.0, 4.0, 3.0],
            "bare spawn": [2.0, 3.2, 3.0],
            "torchrun": [6.0, 12.0, 9.0],
            "ray": [30.0, 30.0, 30.0],
            "fabric": [2.5, 2.5, 2.5],
        }
    )
    made.samples += timed({"spawn": [2.0], "bare spawn": [2.0], "torchrun": [3.0]}, world_size=1)
    return made


LAUNCHERS, OTHERS = ["spawn", "torchrun"], ["ray", "fabric"]
CASES = [Case(name, n, 1) for n in (1, 2) for name in ("spawn", "bare spawn", "torchrun", "bare torchrun", "ray", "fabric")]


@pytest.fixture
def rows(session):
    return launch_times.launch_times(session, CASES, LAUNCHERS, BARE)


def test_ratios_are_of_medians_for_peers_and_of_pairs_for_bare_scripts(rows):
    by_name = {(r.case.launcher, r.case.world_size): r for r in rows}
    assert by_name["spawn", 2].seconds == Spread(3.0, 2.0, 4.0, 3)
    assert by_name["spawn", 2].times_fastest == 1.0 and by_name["torchrun", 2].times_fastest == 3.0
    assert by_name["ray", 2].times_fastest == 10.0 and by_name["torchrun", 1].times_fastest == 1.5
    assert by_name["spawn", 2].times_bare == Spread(1.0, 1.0, 1.25, 3)
    assert by_name["torchrun", 2].times_bare is None, "its bare script was not run"
    assert by_name["bare spawn", 2].times_bare is None and by_name["ray", 1].seconds is None
    json.dumps([row.as_json() for row in rows])


def test_a_case_that_lacks_repeats_is_compared_over_those_it_has(session):
    session.samples = [s for s in session.samples if (s.job.case.name, s.job.repeat) != ("torchrun, 2 ranks", 1)]
    session.samples += timed({"mpi": [1.0]})  # the others' first repeat was their quickest too
    rows = launch_times.launch_times(session, [*CASES, Case("mpi", 2, 1)], [*LAUNCHERS, "mpi"], BARE)
    by_name = {r.case.name: r for r in rows}
    assert launch_times.fastest(rows, 2, [*LAUNCHERS, "mpi"]) is by_name["spawn, 2 ranks"]
    assert by_name["torchrun, 2 ranks"].times_fastest == 7.5 / 2.5 and by_name["mpi, 2 ranks"].times_fastest == 0.5


def test_the_sentences_say_who_was_fastest_and_by_how_much(rows):
    one, two, pairs = launch_times.sentences(rows, LAUNCHERS, OTHERS)
    assert one == "1 rank: spawn was our fastest, 2.00 s. Times as long: torchrun 1.50."
    assert two == (
        "2 ranks: spawn was our fastest, 3.00 s. Times as long: torchrun 3.00, ray 10.00, fabric 0.83. Not faster than fabric."
    )
    assert pairs == "Every launcher launched within 1.05 × the time of its bare script."
    next(r for r in rows if r.case.name == "spawn, 2 ranks").times_bare = Spread(1.06, 1.0, 1.1, 3)
    assert launch_times.sentences(rows, LAUNCHERS, OTHERS)[2].endswith("launch time: spawn, 2 ranks (1.060).")


def test_the_report_shows_all_and_fails_with_a_failed_run(session, rows):
    launch_times.show(session.console, rows, cores=1, threads=1)
    assert launch_times.tell(session.console, session, rows, LAUNCHERS, OTHERS) is True
    session.samples.append(Sample(Job(CASES[0], "timed", ()), "…", 1.0, None, "spawn, 1 rank ended with exit status 1\nlast words"))
    assert launch_times.tell(session.console, session, rows, LAUNCHERS, OTHERS) is False
    text = session.console.export_text()
    for words in ("3.00 (2.00–4.00)", "10.00", "1.000 (1.000–1.250)", "2*", "Noisy", "last words"):
        assert words in text, words
    assert max(len(line) for line in text.splitlines()) <= 132


def test_the_picture_is_drawn(rows, tmp_path):
    paths = plots.launch_times(rows, tmp_path, "a machine", LAUNCHERS, BARE, OTHERS)
    assert [p.name for p in paths] == ["peers.png", "peers.svg"] and "a machine" in paths[1].read_text()
    with Image.open(paths[0]) as picture:
        assert picture.width > 1000 and len(picture.getcolors(1 << 20) or []) > 10


# ------------------------------------------------------------------------------------------------------ every script


@pytest.fixture(scope="module")
def runs():
    """With the loss of one process, which has run."""
    made = PeerRuns(peer_runs.find_peers(list(PACKAGES)))
    session = Session(Console(quiet=True), 100, made.start, made.read)
    session.carry_out([Job(Case("bare plain", 1, 1), "reference", ())])
    assert not session.failures and made.reference[False] == pytest.approx(2.4, abs=1)
    return made


@pytest.mark.launch
@pytest.mark.parametrize("name", [*BY_HAND, *PACKAGES])
def test_every_script_runs_as_two_ranks_and_leaves_nothing_behind(runs, name):
    """The session refuses a wrong world size, another loss than one process's, and processes left behind."""
    if name in PACKAGES and name not in runs.peers:
        pytest.skip(peer_runs.missing_in_words(name))
    before = set(peer_runs.SCRIPTS.iterdir())
    session = Session(Console(quiet=True), 100, runs.start, runs.read)
    session.carry_out([Job(Case(name, 2, 1), "timed", ())])
    assert {path.name for path in set(peer_runs.SCRIPTS.iterdir()) - before} <= {"__pycache__"}
    (sample,) = session.samples
    assert not sample.failure, sample.failure
    assert sample.result["world_size"] == 2 and [r["world_size"] for r in sample.result["ranks"]] == [2, 2]
    assert 0 < sample.result["launch_seconds"] < sample.wall_seconds


@pytest.mark.launch
def test_the_trap_of_accelerate_is_seen(runs, monkeypatch):
    """On CPU, without --multi_gpu, it starts one process whatever --num_processes says."""
    if "accelerate" not in runs.peers:
        pytest.skip(peer_runs.missing_in_words("accelerate"))
    words, variables = runs._command(Case("accelerate", 2, 1))
    words.remove("--multi_gpu")
    monkeypatch.setattr(PeerRuns, "_command", lambda self, case: (words, variables))
    session = Session(Console(quiet=True), 60, runs.start, runs.read)
    session.carry_out([Job(Case("accelerate", 2, 1), "timed", ())])
    assert "was asked for world size 2, but rank 0 says 1" in session.failures[0].failure


@pytest.mark.launch
def test_peers_end_to_end(tmp_path):
    flags = ["--launchers", "plain", "--peers", "--world_sizes", "1", "--repeats", "1", "--output", str(tmp_path)]
    outcome = runner.run([*PEERS, *flags], 60)
    assert outcome.ok, outcome.tail(40)
    written = json.loads((tmp_path / "peers.json").read_text())
    assert written["complete"] and written["machine"]["processor"] and written["versions"]["torch"] and written["commit"]
    assert [s["launcher"] for s in written["samples"] if s["role"] == "timed"] == ["plain", "bare plain"]
    assert {r["case"]: r["times_bare"] is not None for r in written["summary"]} == {"plain": True, "bare plain": False}
    assert all((tmp_path / f"peers{kind}").stat().st_size > 5000 for kind in plots.FORMATS)
    assert "1 rank: plain was our fastest" in outcome.stdout and not outcome.stderr


@pytest.mark.launch
def test_ctrl_c_keeps_what_was_measured(tmp_path):
    flags = ["--launchers", "plain", "--peers", "--world_sizes", "1", "--repeats", "50", "--output", str(tmp_path)]
    with subprocess.Popen([*PEERS, *flags], stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            while not process.stdout.readline().startswith(b"[3/"):  # two references and a timed run
                assert process.poll() is None
            time.sleep(0.5)
            os.killpg(process.pid, signal.SIGINT)
            process.communicate(timeout=20)
            assert process.returncode == 130
        finally:
            process.kill()
    written = json.loads((tmp_path / "peers.json").read_text())
    assert not written["complete"] and len([s for s in written["samples"] if s["result"]]) >= 3
    assert next(r for r in written["summary"] if r["case"] == "plain")["launch_seconds"]["samples"] >= 1


@pytest.mark.launch
def test_bad_input_exits_with_two_and_one_line():
    outcome = runner.run([*PEERS, "--peers", "horse"], 60)
    assert outcome.status == 2 and outcome.stderr.count("\n") == 1 and "horse" in outcome.stderr
