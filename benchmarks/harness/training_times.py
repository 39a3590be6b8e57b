"""From runs to whole trainings: what each command took, and how many times as fast it is as each other tool."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from benchmarks.harness.report import OVERSUBSCRIBED, cell, show_failures, show_noisy, table
from benchmarks.harness.session import Session
from benchmarks.harness.statistics import Spread, paired_ratio, spread
from benchmarks.harness.summary import by_repeat
from benchmarks.harness.training_runs import PRECISIONS, TOOLS, Setting

FIGURES = ("wall_seconds", "launch_seconds", "train_seconds", "leave_seconds", "samples_per_second", "test_accuracy")
ACCURACY = 0.9  # below it something is amiss: ten epochs reach 0.98
POINTS = 0.5  # percentage points of test accuracy that count as the same
OFF = "!"
DIGITS_TEST_SIZE = 360  # 20 % of 1,797


@dataclass
class Training:
    """One setting's whole trainings."""

    case: Setting
    figures: dict[str, Spread | None]
    backend: str | None
    times: dict[str, Spread] = field(default_factory=dict)
    """Per tool: its whole command's time over this one's, of the same repeat. Not of the tools themselves."""
    training_times: dict[str, Spread] = field(default_factory=dict)
    """The same of the training alone, first step to last evaluation."""
    points: dict[str, Spread] = field(default_factory=dict)
    """Per tool, and for a lower precision ``fp32`` under the same launcher: this test accuracy minus that one of the same repeat,
    which started from the same weights; in percentage points."""

    @property
    def accuracy(self) -> Spread | None:
        """After the last epoch."""
        return self.figures["test_accuracy"]

    @property
    def off(self) -> bool:
        """Whether a run's accuracy says that it did not learn what the others did."""
        return self.accuracy is not None and self.accuracy.low < ACCURACY

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        return {
            "case": self.case.title,
            "launcher": self.case.launcher,
            "flags": list(self.case.flags),
            "is_ours": self.case.is_ours,
            "precision": self.case.precision,
            "world_size": self.case.world_size,
            "threads": self.case.threads,
            "backend": self.backend,
            "figures": {name: s and s.as_json() for name, s in self.figures.items()},
            "accuracy_is_off": self.off,
            "times_as_fast": {name: s.as_json() for name, s in self.times.items()},
            "times_as_fast_training": {name: s.as_json() for name, s in self.training_times.items()},
            "accuracy_points": {name: s.as_json() for name, s in self.points.items()},
        }


def trainings(session: Session, cases: Sequence[Setting]) -> list[Training]:
    """One row a setting; ours with their ratios to every tool at the same number of ranks."""

    def of(case: Setting, name: str) -> dict[int, float]:
        samples = session.of("timed", case)
        found = by_repeat(samples, name)
        if name in ("wall_seconds", "leave_seconds"):
            waited = by_repeat(samples, "waited_seconds")
            found = {repeat: seconds - waited[repeat] for repeat, seconds in found.items()}
        return found

    rows = []
    for case in cases:
        backends = {str(s.result["backend"]) for s in session.of("timed", case) if s.result}
        figures = {name: spread(list(of(case, name).values())) for name in FIGURES}
        rows.append(Training(case, figures, "/".join(sorted(backends)) or None))
    for row in (r for r in rows if r.case.is_ours):
        for other in rows:
            if other.case.world_size != row.case.world_size:
                continue
            if not other.case.is_ours:
                name = other.case.launcher
                if ratio := paired_ratio(of(other.case, "wall_seconds"), of(row.case, "wall_seconds")):
                    row.times[name] = ratio
                if ratio := paired_ratio(of(other.case, "train_seconds"), of(row.case, "train_seconds")):
                    row.training_times[name] = ratio
            elif dataclasses.replace(row.case, precision="fp32") == other.case != row.case:
                name = "fp32"
            else:
                continue
            ours, theirs = of(row.case, "test_accuracy"), of(other.case, "test_accuracy")
            if points := spread([100 * (ours[repeat] - theirs[repeat]) for repeat in ours.keys() & theirs.keys()]):
                row.points[name] = points
    return rows


def fastest(rows: Sequence[Training], world_size: int, precision: str) -> Training | None:
    """Our setting with the shortest whole command, of those with the most good runs."""
    ours = [(r, wall) for r in rows if r.case.is_ours and (wall := r.figures["wall_seconds"])]
    there = [(r, wall) for r, wall in ours if (r.case.world_size, r.case.precision) == (world_size, precision)]
    most = max((wall.samples for _, wall in there), default=0)
    return min(((r, w) for r, w in there if w.samples == most), key=lambda pair: pair[1].median, default=(None, None))[0]


def show(console: Console, rows: Sequence[Training], cores: int, threads: int, epochs: int) -> None:
    """The tables, a block a world size: what each took, and ours against the tools."""
    s = "s" * (epochs > 1)
    time = table(
        f"Whole trainings, {epochs} epoch{s}, {threads} thread{'s' * (threads > 1)} per rank: medians (range)",
        "command", "ranks", "whole s", "launch s", "training s", "leaving s", "samples/s", "accuracy",
    )  # fmt: skip
    tools = list(dict.fromkeys(r.case.launcher for r in rows if not r.case.is_ours))
    faster = table("Whole command, times as fast as (paired by repeat)", "command", "ranks", *(TOOLS[name] for name in tools))
    for world_size in sorted({r.case.world_size for r in rows}):
        star = OVERSUBSCRIBED if world_size * threads > cores else ""
        for row in (r for r in rows if r.case.world_size == world_size):
            f, accuracy = row.figures, row.accuracy
            shown = "–" if accuracy is None else f"{accuracy.median:.1%}{OFF if row.off else ''}"
            time.add_row(
                row.case.title, f"{world_size}{star}", cell(f["wall_seconds"]), _median(f["launch_seconds"]),
                _median(f["train_seconds"]), _median(f["leave_seconds"]), _median(f["samples_per_second"], 0), shown,
            )  # fmt: skip
            if row.case.is_ours and tools:
                faster.add_row(row.case.title, f"{world_size}{star}", *(cell(row.times.get(name)) for name in tools))
        time.add_section()
        faster.add_section()
    console.print(time)
    console.print()
    if faster.row_count:
        console.print(faster)
        console.print()
    for name in dict.fromkeys(r.case.precision for r in rows if PRECISIONS[r.case.precision]):
        console.print(f"{name}: {' '.join(PRECISIONS[name])}", highlight=False)
    if any(r.case.world_size * threads > cores for r in rows):
        console.print(f"{OVERSUBSCRIBED} oversubscribed: more ranks × threads than the {cores} cores here.", highlight=False)


def sentences(rows: Sequence[Training]) -> list[str]:
    """Per world size and precision our fastest command against every tool; the lower precisions' accuracy; who did not learn."""
    said = []
    for world_size in sorted({r.case.world_size for r in rows}):
        for precision in dict.fromkeys(r.case.precision for r in rows if r.case.is_ours):
            row = fastest(rows, world_size, precision)
            if not row or not row.times:
                continue
            told = ", ".join(f"{times.text()} as {TOOLS[name]}" for name, times in row.times.items())
            ranks = f"{world_size} rank{'s' * (world_size > 1)}"
            theirs = "" if precision == "fp32" else ", all in float32"
            said.append(f"{ranks}: {row.case.title} is {told.replace(' as ', ' times as fast as ', 1)}{theirs}.")
            far = any(abs(points.median) > POINTS for points in row.points.values())
            against = ", ".join(f"{'its own float32' if n == 'fp32' else TOOLS[n]} {_signed(p)}" for n, p in row.points.items())
            head = f"  Its test accuracy is {'NOT ' if far else ''}within {POINTS} percentage points of theirs"
            said.append(f"{head} (one of {DIGITS_TEST_SIZE} digits is {100 / DIGITS_TEST_SIZE:.2f}): against {against}.")
    if off := [r.case.name for r in rows if r.off]:
        said.append(f"{OFF} A run of {'; '.join(off)} ended with a test accuracy below {ACCURACY:.0%}: not the same work.")
    return said


def _signed(points: Spread) -> str:
    ends = "" if points.samples == 1 else f" ({points.low:+.2f} to {points.high:+.2f})"
    return f"{points.median:+.2f}{ends}"


def _median(value: Spread | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value.median:,.{digits}f}"


def tell(console: Console, session: Session, rows: Sequence[Training]) -> bool:
    """Prints the sentences, noisy cases and failures; returns whether every run was good."""
    for sentence in sentences(rows):
        console.print(sentence, highlight=False, style="yellow" if sentence.startswith(OFF) else "")
    if names := [r.case.name for r in rows if (wall := r.figures["wall_seconds"]) and wall.noisy]:
        show_noisy(console, names)
    return show_failures(console, session)
