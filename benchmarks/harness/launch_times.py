"""From runs to launch times: per case its median, against this project's fastest launcher, and against its bare script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from benchmarks.harness.cases import Case
from benchmarks.harness.report import OVERSUBSCRIBED, cell, show_failures, show_noisy, table
from benchmarks.harness.session import Session
from benchmarks.harness.statistics import Spread, paired_ratio, spread
from benchmarks.harness.summary import by_repeat

BARE_LIMIT = 1.05  # a launcher's launch time against its bare script's


@dataclass
class LaunchTime:
    """One case's launch time, seconds."""

    case: Case
    seconds: Spread | None
    times_fastest: float | None = None
    """Its median over that of the project's fastest launcher at this world size."""
    times_bare: Spread | None = None
    """Over the bare script of the same repeat; for a launcher that has one."""

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        return {
            "case": self.case.launcher,
            "world_size": self.case.world_size,
            "threads": self.case.threads,
            "launch_seconds": self.seconds and self.seconds.as_json(),
            "times_fastest_launcher": self.times_fastest,
            "times_bare": self.times_bare and self.times_bare.as_json(),
        }


def launch_times(session: Session, cases: Sequence[Case], launchers: Sequence[str], bare: Mapping[str, str]) -> list[LaunchTime]:
    """One row a case; ``bare`` names each launcher's bare script."""

    def of(case: Case) -> dict[int, float]:
        return by_repeat(session.of("timed", case), "launch_seconds")

    rows = [LaunchTime(case, spread(list(of(case).values()))) for case in cases]
    for row in rows:
        best = fastest(rows, row.case.world_size, launchers)
        if best and best.seconds and row.seconds:
            row.times_fastest = row.seconds.median / best.seconds.median
        if row.case.launcher in bare:
            by_hand = Case(bare[row.case.launcher], row.case.world_size, row.case.threads)
            row.times_bare = paired_ratio(of(row.case), of(by_hand))
    return rows


def fastest(rows: Sequence[LaunchTime], world_size: int, names: Sequence[str]) -> LaunchTime | None:
    """The one of ``names`` with the smallest median at ``world_size``."""
    there = [r for r in rows if r.case.world_size == world_size and r.case.launcher in names and r.seconds]
    return min(there, key=lambda r: r.seconds.median if r.seconds else 0.0, default=None)


def show(console: Console, rows: Sequence[LaunchTime], cores: int, threads: int) -> None:
    """The table, a block a world size."""
    shown = table(
        f"Launch time: command to the end of the first step on the slowest rank, {threads} thread{'s' * (threads > 1)} per rank",
        "started by", "ranks", "launch s, median (range)", "× our fastest launcher", "× its bare script, paired",
    )  # fmt: skip
    for world_size in sorted({r.case.world_size for r in rows}):
        for row in (r for r in rows if r.case.world_size == world_size):
            star = OVERSUBSCRIBED if world_size * threads > cores else ""
            times = "–" if row.times_fastest is None else f"{row.times_fastest:.2f}"
            shown.add_row(row.case.launcher, f"{world_size}{star}", cell(row.seconds), times, cell(row.times_bare, 3))
        shown.add_section()
    console.print(shown)
    console.print()
    if any(r.case.world_size * threads > cores for r in rows):
        console.print(f"{OVERSUBSCRIBED} oversubscribed: more ranks × threads than the {cores} cores here.", highlight=False)


def sentences(rows: Sequence[LaunchTime], launchers: Sequence[str], others: Sequence[str]) -> list[str]:
    """Per world size who was fastest, and by how much; then the launchers against their bare scripts."""
    said = []
    for world_size in sorted({r.case.world_size for r in rows}):
        best = fastest(rows, world_size, launchers)
        if not best or not best.seconds:
            continue
        head = f"{world_size} rank{'s' * (world_size > 1)}: {best.case.launcher} was our fastest, {best.seconds.median:.2f} s"
        there = [r for r in rows if r.case.world_size == world_size and r.times_fastest and r is not best]
        told = [f"{r.case.launcher} {r.times_fastest:.2f}" for r in there if r.case.launcher in (*launchers, *others)]
        if told:
            head += f"; times as long took {', '.join(told)}"
        faster = [r.case.launcher for r in there if r.case.launcher in others and (r.times_fastest or 1) <= 1]
        said.append(f"{head}." + (f" Not faster than {', '.join(faster)}." if faster else ""))
    pairs = [r for r in rows if r.times_bare]
    over = [f"{r.case.name} ({r.times_bare.median:.3f})" for r in pairs if r.times_bare and r.times_bare.median > BARE_LIMIT]
    if over:
        said.append(f"More than {BARE_LIMIT} × the bare script's launch time: {'; '.join(over)}.")
    elif pairs:
        said.append(f"Every launcher launched within {BARE_LIMIT} × the time of its bare script.")
    return said


def tell(console: Console, session: Session, rows: Sequence[LaunchTime], launchers: Sequence[str], others: Sequence[str]) -> bool:
    """Prints the sentences, noisy cases and failures; returns whether every run was good."""
    for sentence in sentences(rows, launchers, others):
        console.print(sentence, highlight=False)
    if names := [r.case.name for r in rows if r.seconds and r.seconds.noisy]:
        show_noisy(console, names)
    return show_failures(console, session)
