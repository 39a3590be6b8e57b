"""What a person reads at the end of an anatomy, on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.harness.phases import AFTER, LABELS, LAUNCHING, PhaseRow
from benchmarks.harness.report import OVERSUBSCRIBED, cell, table
from benchmarks.harness.scaling import Point, sentences
from benchmarks.harness.shipped import Gift, Speed
from benchmarks.harness.statistics import Spread

COUNTS_A_TABLE = 6  # numbers of ranks side by side within 132 columns


def say(console: Console, text: str) -> None:
    """A sentence, as it is."""
    console.print(text, markup=False, highlight=False)


def _show(console: Console, made: Table) -> None:
    """A table under a title that may be wider."""
    title, made.title = made.title, None
    console.print(title, style="bold", highlight=False)
    console.print(made)


def not_run(console: Console, missing: Mapping[str, str]) -> None:
    """Names what is not here, with the reason and the remedy."""
    for title, reason in missing.items():
        say(console, f"Not run: {title}: {reason}")


def phases(console: Console, rows: Sequence[PhaseRow], repeats: int) -> None:
    """Two tables: up to the first step, and the whole run."""
    case = rows[0].case
    s = "s" * (case.threads > 1)
    what = f"median (range) of {repeats}, {case.world_size} ranks, {case.threads} thread{s} per rank, seconds"
    launching = table(f"Where launch time goes: {what}", "launcher", *(LABELS[name] for name in LAUNCHING))
    leaving = [name for name in AFTER if name != "training_done"]
    whole = table(f"The whole run: {what}", "launcher", "launch", "training", "leaving", *(f"of it: {LABELS[n]}" for n in leaving))
    for row in rows:
        launching.add_row(row.case.title, *(cell(row.phases[name]) for name in LAUNCHING))
        times = (row.times[name] for name in ("launch_seconds", "train_seconds", "leave_seconds"))
        whole.add_row(row.case.title, *(cell(t) for t in times), *(cell(row.phases[name]) for name in leaving))
    _show(console, launching)
    say(
        console,
        "Each phase is the time between two marks, in order of time, of the rank that was last to finish the first step; medians "
        "are taken\nphase by phase. A process that is forked finds done what its parent did: that takes it no time.\n",
    )
    _show(console, whole)
    say(
        console,
        "Launch: from the command's start to the first step's end on the slowest rank. Leaving: from the training's end (slowest\n"
        "rank) to the command's end.\n",
    )


def gifts(console: Console, found: Sequence[Gift]) -> None:
    """Two tables: threads and cores as shipped, and each launcher's variables."""
    if not found:
        return
    left = table(
        f"What each launcher leaves its {found[0].case.world_size} ranks with, as shipped (--inspect)",
        "launcher", "threads per rank", "OMP_NUM_THREADS", "cores of each rank", "variables set",
    )  # fmt: skip
    names = table("Variables that each launcher sets (values: anatomy.json)", "launcher")
    names.add_column("names", justify="left")
    for gift in found:
        variables = gift.variables
        count = "unknown" if variables is None else str(len(variables))
        left.add_row(gift.case.title, gift.each("threads_found"), gift.each("omp_num_threads"), gift.cores, count)
        names.add_row(gift.case.title, ", ".join(variables) if variables else "none" if variables == {} else "unknown")
    for each in (left, names):
        _show(console, each)
        console.print()


def speeds(console: Console, found: Sequence[Speed], cores: int) -> None:
    """How much of each launcher's apparent speed was threads."""
    made = table(
        f"How much was threads? Training, {found[0].fair.world_size} ranks on {cores} cores: median (range)",
        "launcher", "threads fair", "shipped", "fair s", "as shipped s", "speed as shipped", "speed fair", "due to threads",
    )  # fmt: skip
    for one in found:
        made.add_row(
            one.fair.title, str(one.fair.threads), str(one.threads_as_shipped or "–"), cell(one.fair_seconds),
            cell(one.shipped_seconds), cell(one.apparent), cell(one.real), cell(one.threads),
        )  # fmt: skip
    _show(console, made)
    say(console, "Speed: how many times as fast as plain. Ratios are taken within a repeat.")
    for one in found:
        if one.fair.launcher != "plain":
            say(console, one.sentence())
    console.print()


def scaling(console: Console, points: Sequence[Point], floor: Spread | None, cores: int, repeats: int) -> None:
    """Launch time by ranks, and what follows from it."""
    sizes = sorted({point.case.world_size for point in points})
    titles = list(dict.fromkeys(point.case.title for point in points))
    at = {(point.case.title, point.case.world_size): point for point in points}
    threads = points[0].case.threads
    for start in range(0, len(sizes), COUNTS_A_TABLE):
        some = sizes[start : start + COUNTS_A_TABLE]
        made = table(
            f"Launch time by ranks: median (range) of {repeats}, {threads} thread{'s' * (threads > 1)} per rank, seconds",
            "launcher",
            *(f"{n}{OVERSUBSCRIBED if n * threads > cores else ''}" for n in some),
        )
        for title in titles:
            made.add_row(title, *(cell(at[title, n].launch_seconds) for n in some))
        _show(console, made)
    if any(n * threads > cores for n in sizes):
        say(console, f"{OVERSUBSCRIBED} oversubscribed: more ranks × threads than the {cores} cores here.")
    if floor:
        say(console, f"Floor: one interpreter that imports what a rank imports and makes one step takes {floor.text()} s.")
    for sentence in sentences(points):
        say(console, sentence)
    console.print()
