"""steps.py: what it plans, what it makes of runs, and one small run of it as a user makes it."""

import json
import sys

import pytest
from PIL import Image
from rich.console import Console

from benchmarks import steps
from benchmarks.harness import mpis, step_parts, step_plots
from benchmarks.harness.cases import Case
from benchmarks.harness.runner import REPOSITORY, run
from benchmarks.harness.session import Job, Sample, Session
from benchmarks.harness.step_parts import Measured
from common.errors import UsageError

STEPS = [sys.executable, str(REPOSITORY / "benchmarks" / "steps.py")]


def asked(tmp_path, *argv):
    return steps.Steps([*argv, "--output", str(tmp_path)])


# ------------------------------------------------------------------------------------------------------- the plan


def test_every_way_gets_a_launcher_that_fits(tmp_path):
    plan = asked(tmp_path, "--jobs", "random")
    assert {way: launcher for way, launcher, _ in plan.ways} == {
        "one_process": "plain", "alone": "plain", "side_by_side": "plain",
        "ddp": "spawn", "by_hand": "spawn", "by_hand_flat": "spawn", "shared_memory": "spawn", "mpi": "mpi",
    }  # fmt: skip
    of_mpi = asked(tmp_path, "--launchers", "mpi", "--ways", "ddp", "mpi")
    assert of_mpi.ways == [("ddp", "mpi", ""), ("mpi", "mpi", "")], "with MPI's launcher alone all ways run under it"


def test_a_reference_gets_a_ranks_share_of_the_batch_and_as_many_processes(tmp_path):
    plan = asked(tmp_path, "--jobs", "random", "--ways", "alone", "side_by_side", "ddp", "--world_sizes", "3", "--repeats", "2")
    assert plan.threads == 1
    runs = plan.runs()
    by_way = {way: [j for j in runs if j.role.startswith(f"random/{way}/3")] for way in ("alone", "side_by_side", "ddp")}
    assert {way: len(jobs) for way, jobs in by_way.items()} == {"alone": 4, "side_by_side": 12, "ddp": 4}, (
        "each repeat with parts noted and without"
    )
    noting = [j for jobs in by_way.values() for j in jobs if "--step_times" in j.flags]
    assert {j.role for j in noting} == {f"random/{way}/3" for way in by_way}
    assert all("--global_batch_size 22" in " ".join(j.flags) for j in by_way["alone"] + by_way["side_by_side"])
    assert all("--sync ddp" in " ".join(j.flags) and j.case.world_size == 3 for j in by_way["ddp"])
    assert all(j.beside for j in by_way["side_by_side"]) and not any(j.beside for j in by_way["alone"] + by_way["ddp"])
    ways = [j.role.split("/")[1] for j in runs]
    assert ways[:10] == ways[10:][::-1], "the order is turned round"


def test_the_batch_a_rank_is_kept(tmp_path):
    plan = asked(tmp_path, "--jobs", "random", "--ways", "alone", "ddp", "--batch_size", "10")
    (alone, *_), (ddp, *_) = ([j for j in plan.runs() if f"/{way}/" in j.role] for way in ("alone", "ddp"))
    assert "--batch_size" not in alone.flags and "--global_batch_size 10" in " ".join(alone.flags)
    assert "--batch_size" in ddp.flags


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--jobs", "horse"], "--jobs horse"),
        (["--ways", "auto"], "--ways auto"),
        (["--launchers", "horse"], "--launchers horse"),
        (["--world_sizes", "1"], "--world_sizes 1"),
        (["--sync", "ddp"], "--sync: steps.py sets it itself"),
        (["--step_times"], "--step_times: steps.py sets it itself"),
        (["--job", "random"], "--job: steps.py sets it itself"),
        (["--ways", "mpi", "--launchers", "spawn"], "add mpi to --launchers"),
        (["--sampler", "uneven"], "--step_times with --sampler uneven"),
        (["--threads", "as_shipped"], "anatomy.py"),
        (["--global_batch_size", "2", "--world_sizes", "4"], "no sample"),
        (["--repeats", "0"], "--repeats 0"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, said, tmp_path):
    with pytest.raises(UsageError) as caught:
        asked(tmp_path, *arguments)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_here_is_left_out_unless_it_was_named(tmp_path, monkeypatch):
    def none(name=""):
        raise UsageError("mpirun is not installed: install it")

    monkeypatch.setattr(mpis, "named", none)
    plan = asked(tmp_path)
    assert plan.missing == {"mpi": "mpirun is not installed: install it"} and "mpi" not in {way for way, *_ in plan.ways}
    with pytest.raises(UsageError, match="mpirun is not installed"):
        asked(tmp_path, "--ways", "mpi")


# ------------------------------------------------------------------------------------------------------- the figures


def samples(measured, repeat, *steps_of_ranks, mean=1.0):
    """A run whose ranks' median steps took so many milliseconds, half of each in communication; one with ``mean`` times those."""
    ranks = []
    for ms in steps_of_ranks:
        medians = dict.fromkeys(step_parts.PARTS, ms / 1000 / 10) | {"communication": ms / 1000 / 2, "step": ms / 1000}
        ranks.append({"median": medians})
    noted = {"step_times": {"ranks": ranks}}
    plain = {"step_times": None, "step_seconds": 10 * mean * max(steps_of_ranks) / 1000, "steps_after_first": 10}
    both = ((measured.role, noted), (measured.plain_role, plain))
    return [Sample(Job(measured.case, role, (), repeat), "python x", 1.0, result) for role, result in both]


@pytest.fixture
def measured():
    ways = {way: Case("spawn", 2, 1) for way in ("ddp", "shared_memory")} | {"mpi": Case("mpi", 2, 1)}
    ways |= {way: Case("plain", 1, 1) for way in step_parts.REFERENCES}
    return {way: Measured("random", way, case, 2) for way, case in ways.items()}


@pytest.fixture
def session(measured):
    made = Session(Console(quiet=True), 10)
    for repeat, drift in enumerate((1.0, 2.0)):
        made.samples += [
            *samples(measured["ddp"], repeat, 0.9 * drift, 1.0 * drift, mean=1.2),
            *samples(measured["shared_memory"], repeat, 0.2 * drift, 0.19 * drift),
            *samples(measured["mpi"], repeat, 0.5 * drift, 0.4 * drift),
            *samples(measured["one_process"], repeat, 0.3 * drift),
            *samples(measured["alone"], repeat, 0.1 * drift),
            *samples(measured["side_by_side"], repeat, 0.1 * drift),  # two processes, a run each
            *samples(measured["side_by_side"], repeat, 0.125 * drift),
        ]
    return made


def test_ratios_are_of_slowest_ranks_within_a_repeat(session, measured):
    found = {r.measured.way: r for r in step_parts.ratios(session, list(measured.values()))}
    assert set(found) == {"ddp", "shared_memory", "mpi"}
    assert found["ddp"].below_ddp is None
    shared = found["shared_memory"]
    assert shared.median_below_ddp.median == pytest.approx(5)
    assert shared.below_ddp.low == pytest.approx(6) == pytest.approx(shared.below_ddp.high), "what drifts cancels"
    assert shared.against["alone"].median == pytest.approx(2) and shared.against["side_by_side"].median == pytest.approx(1.6)
    assert found["mpi"].below_ddp.median == pytest.approx(2.4), "against spawn's ddp where MPI ran none"
    assert shared.sentence() == (
        "random, 2 ranks, shared_memory (spawn): a step takes 0.300 (0.200–0.400) ms: 6.00 (6.00–6.00) times below ddp's "
        "(the median step: 5.00 (5.00–5.00)), "
        "2.00 (2.00–2.00) times alone, 1.60 (1.60–1.60) times side by side, 1.50 (1.50–1.50) times as fast as one process with the "
        "whole batch (side by side: 2.40 (2.40–2.40))."
    )
    session.samples[0].result["step_times"]["ranks"][1]["median"]["step"] = 0.0001  # ddp's slowest rank is now the other
    slower = next(r for r in step_parts.ratios(session, list(measured.values())) if r.measured.way == "mpi").median_below_ddp
    assert slower.median == pytest.approx((0.9 / 0.5 + 2) / 2)


def test_slower_than_ddp_is_said_the_other_way_round(measured):
    made = Session(Console(quiet=True), 10)
    made.samples += [*samples(measured["ddp"], 0, 1.0), *samples(measured["mpi"], 0, 4.0)]
    (_, mpi) = step_parts.ratios(made, list(measured.values()))
    assert mpi.sentence() == "random, 2 ranks, mpi (mpi): a step takes 4.000 ms: 4.00 times above ddp's (the median step: 4.00)."


def test_targets_are_judged_by_both_references(session, measured):
    told = step_parts.targets(step_parts.ratios(session, list(measured.values())))
    assert told == [
        "Target of shared_memory (spawn): 4 times below ddp's: reached (6.00); at most 2.2 times alone: reached (2.00); "
        "at most 2.2 times side by side: reached (1.60).",
        "Target of mpi (mpi): 4 times below ddp's: NOT reached (2.40); at most 2.2 times alone: NOT reached (5.00); "
        "at most 2.2 times side by side: NOT reached (4.00).",
    ]


def test_rows_have_every_rank_and_the_picture_draws_them(session, measured, tmp_path):
    rows = step_parts.summarise(session, list(measured.values()))
    by_way = {row.measured.way: row for row in rows}
    assert [len(by_way[way].ranks) for way in ("ddp", "alone", "side_by_side")] == [2, 1, 2]
    assert by_way["ddp"].step.median == pytest.approx(0.0015) and by_way["ddp"].ranks[0]["step"].median == pytest.approx(0.00135)
    assert by_way["side_by_side"].ranks[1]["communication"].median == pytest.approx(0.00009375)
    written = json.loads(json.dumps([row.as_json() for row in rows]))
    assert written[0]["ranks"][1]["step"]["samples"] == 2
    png, svg = step_plots.steps(rows, tmp_path, "a machine")
    with Image.open(png) as picture:
        assert picture.width > 600
    text = svg.read_text()
    assert (png.name, svg.name) == ("steps.png", "steps.svg") and "shared_memory" in text and "<svg" in text


def test_runs_that_made_too_few_steps_are_left_out(measured):
    made = Session(Console(quiet=True), 10)
    made.samples += samples(measured["ddp"], 0, 1.0)
    made.samples[0].result["step_times"]["ranks"][0]["median"] = None
    (row,) = step_parts.summarise(made, [measured["ddp"]])
    made.samples[1].result["steps_after_first"] = 0
    assert row.ranks == [] and row.step is None and step_parts.ratios(made, [measured["ddp"]]) == []


# ------------------------------------------------------------------------------------------------------- as a user


@pytest.mark.launch
def test_two_ways_end_to_end(tmp_path):
    flags = ["--jobs", "random", "--ways", "side_by_side", "ddp", "--repeats", "1", "--epochs", "2", "--data_size", "1000"]
    outcome = run([*STEPS, *flags, "--output", str(tmp_path)], 200)
    assert outcome.ok, outcome.tail(40)
    written = json.loads((tmp_path / "steps.json").read_text())
    assert written["complete"] and {"machine", "versions", "commit", "command", "created", "settings"} <= written.keys()
    rows = {row["way"]: row for row in written["summary"]["steps"]}
    assert set(rows) == {"side_by_side", "ddp"} and all(len(row["ranks"]) == 2 for row in rows.values())
    assert all(rank["step"]["median"] > 0 for row in rows.values() for rank in row["ranks"])
    assert rows["ddp"]["ranks"][0]["communication"]["median"] > 0
    assert len(written["samples"]) == 6, "two processes at once, and one run of two ranks; each twice"
    assert all(s["result"]["step_times"]["ranks"][0]["raw"]["step"] for s in written["samples"] if s["result"]["step_times"])
    (ratio,) = written["summary"]["ratios"]
    assert ratio["times_reference"]["side_by_side"]["median"] > 1
    assert "random, 2 ranks, ddp (spawn): a step takes" in outcome.stdout
    for kind in (".png", ".svg"):
        assert (tmp_path / f"steps{kind}").stat().st_size > 5000


@pytest.mark.launch
def test_bad_input_exits_with_two_and_one_line():
    outcome = run([*STEPS, "--ways", "horse"], 60)
    assert outcome.status == 2 and outcome.stderr.count("\n") == 1 and "horse" in outcome.stderr
