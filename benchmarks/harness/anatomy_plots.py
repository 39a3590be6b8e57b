"""The pictures of an anatomy: time lines per launcher and rank, and launch time against ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.phases import LABELS, PhaseRow, durations, timelines
from benchmarks.harness.plots import both, plain_seconds, with_range
from benchmarks.harness.scaling import Point
from benchmarks.harness.statistics import Spread
from common.plots import TEN_COLOURS, figure

LINES = ("-", "--", ":", "-.")
GAP = 0.8  # between launchers, in bars


def time_lines(rows: Sequence[PhaseRow], folder: Path, caption: str) -> list[Path]:
    """A bar a rank, grouped by launcher, cut into phases: of each launcher the run in the middle by launch time."""
    shown = [row for row in rows if row.shown]
    bars = sum(row.case.world_size for row in shown)
    drawn = figure(11, 1.9 + 0.23 * bars + 0.2 * len(shown))
    axes = drawn.add_subplot()
    colours = dict(zip(LABELS, TEN_COLOURS, strict=True))
    labelled: set[str] = set()
    ticks, names, y = [], [], 0.0
    for row in shown:
        assert row.shown
        ranks, top = timelines(row.shown), y
        for rank in ranks:
            at = 0.0
            for name, seconds in durations(rank["seconds"], row.shown.wall_seconds).items():
                label = None if name in labelled else LABELS[name]
                labelled.add(name)
                axes.barh(y, seconds, left=at, height=0.86, color=colours[name], label=label)
                at += seconds
            if (first := rank["seconds"].get("first_step_done")) is not None:
                label = None if "mark" in labelled else "first step done"
                labelled.add("mark")
                axes.plot(first, y, marker="D", markersize=4.5, color="black", markeredgecolor="white", linestyle="", label=label)
            ticks.append(y)
            names.append(f"rank {rank['rank']}")
            y += 1
        launch = f"{row.shown.value('launch_seconds') or 0:.2f} s"
        axes.annotate(
            f"{row.case.title}\nlaunch {launch}" if len(ranks) > 1 else f"{row.case.title}, {launch}",
            (0, (top + y - 1) / 2),
            xycoords=("axes fraction", "data"),
            xytext=(-46, 0),
            textcoords="offset points",
            ha="right",
            va="center",
        )
        y += GAP
    axes.set_yticks(ticks, names, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - GAP - 0.4, -0.7)
    axes.set_xlim(left=0)
    axes.grid(False, axis="y")
    axes.set_axisbelow(True)
    axes.set_xlabel("seconds since the command was started")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    told = [label for label in (*LABELS.values(), "first step done") if label in handles]
    rows_first = [label for column in range(6) for label in told[column::6]]  # a legend is filled column by column
    drawn.legend(
        [handles[label] for label in rows_first],
        rows_first,
        loc="outside upper center",
        ncols=6,
        fontsize=8.5,
        title="Where launch time goes: each rank's phases, of each launcher the median run",
        title_fontsize=12,
    )
    once = [row.case.title for row in shown if row.case.variant in ("forkserver", "fork") or row.case.launcher == "elastic"]
    note = f"Under {', '.join(once)} torch is imported once, before the ranks are started. " if once else ""
    return both(drawn, folder, "anatomy", note + caption)


def launch_scaling(points: Sequence[Point], floor: Spread | None, cores: int, folder: Path, caption: str) -> list[Path]:
    """Launch time against ranks on log axes, a line a launcher, and the floor."""
    drawn = figure(10, 5.6)
    axes = drawn.add_subplot()
    launchers = list(dict.fromkeys(point.case.launcher for point in points))
    titles = list(dict.fromkeys(point.case.title for point in points))
    drawn_before: dict[str, int] = {}
    for number, title in enumerate(titles):
        shift = 1 + 0.012 * (number - (len(titles) - 1) / 2)  # a little apart, so that equal ones can be told from each other
        mine = [point for point in points if point.case.title == title]
        launcher = mine[0].case.launcher
        # A launcher's variants share its colour and differ in their lines.
        variant = drawn_before[launcher] = drawn_before.get(launcher, -1) + 1
        spreads = [(p.case.world_size * shift, s) for p in mine if (s := p.launch_seconds)]
        if spreads:
            with_range(axes, spreads, launchers.index(launcher), title, linestyle=LINES[variant % len(LINES)])
    if floor:
        axes.axhspan(floor.low, floor.high, color="0.5", alpha=0.15, linewidth=0)
        label = f"floor: one interpreter,\nthe same imports,\none step: {floor.median:.2f} s"
        axes.axhline(floor.median, color="black", linestyle=(0, (6, 3)), linewidth=1.2, label=label)
    sizes = sorted({point.case.world_size for point in points})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{n}{'*' if n > cores else ''}" for n in sizes])
    heights = [s.high for p in points if (s := p.launch_seconds)] + ([floor.high] if floor else [])
    depths = [s.low for p in points if (s := p.launch_seconds)] + ([floor.low] if floor else [])
    lowest, highest = min(depths) / 1.35, max(heights) * 1.15
    axes.set_ylim(lowest, highest)
    plain_seconds(axes)
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.set(xlabel="ranks", ylabel="launch time (s): command to the end of the first step")
    handles, labels = axes.get_legend_handles_labels()
    last = 1 if floor else 0  # the floor's line comes first there
    drawn.legend(handles[last:] + handles[:last], labels[last:] + labels[:last], loc="outside right upper")
    drawn.suptitle("Launch time against ranks: median and range", fontsize=12)
    more = " * more ranks than cores." if any(n > cores for n in sizes) else ""
    return both(drawn, folder, "launch_scaling", f"{more} {caption}".strip())
