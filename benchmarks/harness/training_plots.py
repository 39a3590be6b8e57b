"""The picture of whole trainings: what each command took, and how many times as fast ours are as the other tools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.plots import both, has_parts, stacked
from benchmarks.harness.report import OVERSUBSCRIBED
from benchmarks.harness.training_runs import TOOLS
from benchmarks.harness.training_times import OFF, Training
from common.plots import COLOURS, MARKERS, figure

TOOL_COLOURS = tuple(COLOURS[n] for n in (1, 3, 5, 6))  # those that the parts of a bar leave


def whole_trainings(rows: Sequence[Training], folder: Path, caption: str, cores: int, epochs: int) -> list[Path]:
    """Bars cut into launch, training and leaving, the quickest on top of each number of ranks; beside ours the ratios."""
    shown = [row for row in rows if has_parts(row.figures)]
    shown.sort(key=lambda r: (r.case.world_size, wall.median if (wall := r.figures["wall_seconds"]) else 0))
    drawn = figure(13, 2.4 + 0.33 * len(shown))
    left, right = drawn.subplots(1, 2, width_ratios=[1.5, 1], sharey=True)
    several = len({r.case.world_size for r in shown}) > 1
    labels = [_label(row, cores, several) for row in shown]
    stacked(left, labels, [row.figures for row in shown])
    left.set(xlabel="seconds (median; whisker: range of the whole command)", title="Whole command")
    for text, row in zip(left.get_yticklabels(), shown, strict=True):
        text.set(color="black" if row.case.is_ours else "0.45", style="normal" if row.case.is_ours else "italic")
    tools = list(dict.fromkeys(name for row in shown for name in row.times))
    for number, tool in enumerate(tools):
        points = [(y + 0.12 * (number - (len(tools) - 1) / 2), row.times[tool]) for y, row in enumerate(shown) if tool in row.times]
        right.errorbar(
            [s.median for _, s in points],
            [y for y, _ in points],
            xerr=[[s.median - s.low for _, s in points], [s.high - s.median for _, s in points]],
            linestyle="",
            marker=MARKERS[number % len(MARKERS)],
            color=TOOL_COLOURS[number % len(TOOL_COLOURS)],
            markersize=5,
            linewidth=1,
            label=TOOLS[tool],
        )
    right.axvline(1, color="0.5", linewidth=0.8)
    right.set_xlim(left=0)
    right.set(xlabel="times as fast (paired: median, range)", title="Ours against the other tools")
    parts, names = left.get_legend_handles_labels()
    more, others = right.get_legend_handles_labels()
    s = "s" * (epochs > 1)
    drawn.legend(
        [*parts, *more],
        [*names, *others],
        loc="outside upper center",
        ncols=3,
        fontsize=8.5,
        title=f"The same CNN trained for {epochs} epoch{s}, test accuracy after it; other tools in grey, in float32",
        title_fontsize=12,
    )
    note = f"{OFF} a test accuracy that is off. " if any(r.off for r in shown) else ""
    note += f"{OVERSUBSCRIBED} more ranks than cores. " if any(_over(r, cores) for r in shown) else ""
    return both(drawn, folder, "training", note + caption)


def _over(row: Training, cores: int) -> bool:
    return row.case.world_size * row.case.threads > cores


def _label(row: Training, cores: int, several: bool) -> str:
    ranks = f" · {row.case.world_size}" if several else ""
    percent = f", {row.accuracy.median:.1%}{OFF if row.off else ''}" if row.accuracy else ""
    return f"{row.case.title}{ranks}{OVERSUBSCRIBED if _over(row, cores) else ''}{percent}"
