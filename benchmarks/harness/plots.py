"""The pictures of a comparison. Each is drawn from what compare.json holds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.launch_times import BARE_LIMIT, LaunchTime
from benchmarks.harness.lossy import LOSSLESS
from benchmarks.harness.parity import FP32_LIMIT, FP32_STEPS, FP64_LIMIT, relative_differences
from benchmarks.harness.session import Session
from benchmarks.harness.statistics import Spread
from benchmarks.harness.summary import Row, first_result
from common.plots import COLOURS, MARKERS, figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")


def both(drawn: Figure, folder: Path, name: str, caption: str) -> list[Path]:
    """Saves ``drawn`` in both formats; the paths."""
    paths = [folder / f"{name}{kind}" for kind in FORMATS]
    for path in paths:
        save(drawn, path, caption)
    return paths


def _launchers(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.name for row in rows))


def with_range(axes: Axes, points: Sequence[tuple[float, Spread]], number: int, label: str | None, **style: Any) -> None:
    """A line through medians with their ranges, in the style of ``number`` where ``style`` does not say otherwise."""
    usual: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "markersize": 5, "linewidth": 1.4, "capsize": 3}
    axes.errorbar(
        [x for x, _ in points],
        [s.median for _, s in points],
        yerr=[[s.median - s.low for _, s in points], [s.high - s.median for _, s in points]],
        label=label,
        **(usual | {"color": COLOURS[number % len(COLOURS)]} | style),
    )


def speedup(rows: list[Row], folder: Path, caption: str, cores: int, threads: int, weak: bool) -> list[Path]:
    """Measured speedup of training and of the whole command with ranges, the ideal line, and the efficiency below."""
    drawn = figure(11, 6.2)
    axes = drawn.subplots(2, 2, sharex=True, sharey="row", height_ratios=[3, 1.4])
    sizes = sorted({row.case.world_size for row in rows})
    launchers = _launchers(rows)
    one = f"one process with {threads} thread{'s' * (threads > 1)}"
    highest, most = 1.0, 1.0
    for column, (what, title) in enumerate((("train_seconds", "training"), ("wall_seconds", "whole command"))):
        upper, lower = axes[0][column], axes[1][column]
        for number, launcher in enumerate(launchers):
            # A little apart, so that launchers that are equal can be told from each other.
            shift = 1 + 0.025 * (number - (len(launchers) - 1) / 2)
            mine = [(r.case.world_size, s) for r in rows if r.name == launcher and (s := r.speedup[f"{what}/one_rank"])]
            if not mine:
                continue
            each = [(n, Spread(s.median / n, s.low / n, s.high / n, s.samples)) for n, s in mine]
            highest, most = max(highest, *(s.high for _, s in mine)), max(most, *(s.high for _, s in each))
            with_range(upper, [(n * shift, s) for n, s in mine], number, launcher)
            with_range(lower, [(n * shift, s) for n, s in each], number, None)
        ideal = [sizes[0] * (sizes[-1] / sizes[0]) ** (i / 50) for i in range(51)]  # a straight line, bent by the axis
        upper.plot(ideal, ideal, color="0.5", linestyle=":", label="ideal: as many\ntimes as ranks")
        upper.axhline(1, color="0.5", linewidth=0.8)
        if whole := _all_threads(rows, what):
            upper.axhline(whole, color="black", linestyle="--", linewidth=1, label=f"one process with\nall {cores} threads")
        upper.set_title(f"{title}, against {one}")
        lower.axhline(1, color="0.5", linestyle=":")
        lower.set(xlabel="ranks")
        lower.set_xscale("log", base=2)
        lower.set_xticks(sizes, [f"{n}{'*' if n * threads > cores else ''}" for n in sizes])
        lower.minorticks_off()
    axes[0][0].set_ylim(0, max(highest * 1.15, min(max(sizes), highest * 1.6)))
    axes[1][0].set_ylim(0, most * 1.15)
    axes[0][0].set_ylabel("speedup (times)" + (", N·t(1)/t(N)" if weak else ""))
    axes[1][0].set_ylabel("speedup / ranks")
    drawn.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center")
    drawn.suptitle(f"Speedup by launcher, {'weak' if weak else 'strong'} scaling: median and range", fontsize=12)
    more = " * more ranks than cores." if any(n * threads > cores for n in sizes) else ""
    return both(drawn, folder, "speedup", f"{more} {caption}".strip())


def _all_threads(rows: list[Row], what: str) -> float | None:
    """How many times faster one process with all threads is than with one rank's."""
    for row in rows:
        one, whole = row.speedup[f"{what}/one_rank"], row.speedup[f"{what}/all_threads"]
        if one and whole and whole.median:
            return one.median / whole.median
    return None


PARTS = (("launch_seconds", "launch: command to the end of the first step", COLOURS[0]),
         ("train_seconds", "training: all steps after the first, evaluation", COLOURS[2]),
         ("leave_seconds", "leaving: end of training to end of command", COLOURS[4]))  # fmt: skip


def wall_clock(rows: list[Row], folder: Path, caption: str) -> list[Path]:
    """Launch, training and leaving, stacked per launcher and world size."""
    shown = [row for row in rows if has_parts(row.figures)]
    drawn = figure(9.5, 1.9 + 0.32 * len(shown))
    axes = drawn.add_subplot()
    labels = [f"{row.name} · {row.case.world_size}{'*' if row.oversubscribed else ''}" for row in shown]
    stacked(axes, labels, [row.figures for row in shown])
    axes.set(xlabel="seconds (median; the bar's whisker is the range of the whole command)", ylabel="launcher · ranks")
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=1 if len(shown) < 4 else 3, fontsize=8)
    more = " * more ranks than cores." if any(row.oversubscribed for row in shown) else ""
    return both(drawn, folder, "wall_clock", f"{more} {caption}".strip())


def has_parts(figures: Mapping[str, Spread | None]) -> bool:
    """Whether a command's launch, training and leaving were all measured."""
    return all(figures[name] for name, _, _ in PARTS)


def stacked(axes: Axes, labels: Sequence[str], figures: Sequence[Mapping[str, Spread | None]]) -> None:
    """A bar a command, cut into launch, training and leaving, with the range of the whole; the first is on top."""
    left = [0.0] * len(labels)
    for name, label, colour in PARTS:
        widths = [s.median if (s := each[name]) else 0.0 for each in figures]
        axes.barh(labels, widths, left=left, color=colour, label=label, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, each in enumerate(figures):
        if wall := each["wall_seconds"]:
            axes.errorbar(
                wall.median, y, xerr=[[wall.median - wall.low], [wall.high - wall.median]], color="black", capsize=3, linewidth=1
            )
            axes.annotate(
                f"{wall.median:.1f} s", (max(wall.high, left[y]), y), xytext=(5, 0), textcoords="offset points", va="center"
            )
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.1)


def loss(session: Session, rows: list[Row], folder: Path, caption: str, threads: int, weak: bool) -> list[Path]:
    """Loss curves on top of each other, and their difference from the single process below, in both precisions.

    Runs that lose something on purpose are held against one lossless process; they have no float64 runs.
    """
    lossless = session.of(LOSSLESS)
    columns = (("fp32", "timed"),) if lossless else (("fp32", "timed"), ("fp64", "fp64"))
    drawn = figure(10, 6.8)
    axes = drawn.subplots(2, len(columns), height_ratios=[1.3, 1], sharex="col", squeeze=False)
    single: dict[str, dict[int, dict[str, Any] | None]] = {"fp32": {}, "fp64": {}}
    for row in rows:
        n = row.case.world_size
        fp64 = [s for s in session.of("fp64 reference") if not weak or s.job.label.endswith(f" {n}")]
        fp32 = [s for s in lossless or session.of("reference") if s.job.label.endswith(f" {n}")] if weak else lossless
        one = [s for s in session.of("timed") if s.job.case.launcher == "plain" and s.job.case.world_size == 1]
        single["fp64"][n], single["fp32"][n] = first_result(fp64), first_result(fp32 or one)
    for column, (precision, role) in enumerate(columns):
        upper, lower = axes[0][column], axes[1][column]
        for number, launcher in enumerate(_launchers(rows)):
            labelled = False
            for row in (r for r in rows if r.name == launcher):
                result, reference = first_result(session.of(role, row.case)), single[precision][row.case.world_size]
                if not result or not result["loss_per_step"]:
                    continue
                steps = range(1, len(result["loss_per_step"]) + 1)
                # The first lies widest: equal curves show as bands of all colours.
                style: dict[str, Any] = {"color": COLOURS[number], "linewidth": 1.2 + 2 * (len(_launchers(rows)) - 1 - number)}
                upper.plot(steps, result["loss_per_step"], label=None if labelled else launcher, **style)
                labelled = True
                if reference and (lossless or (launcher, row.case.world_size) != ("plain", 1)):
                    _growing(lower, result, reference, **style)
        control = first_result(session.of("control"))
        reference = single[precision].get(min(single[precision], default=1))
        if precision == "fp32" and control and reference:
            parts = session.of("control")[0].job.label.split()[-1]
            label = f"control: one process that sums its batch in {parts} parts"
            _growing(lower, control, reference, color="black", linestyle="--", linewidth=1.4, label=label)
        limit = FP32_LIMIT if precision == "fp32" else FP64_LIMIT
        last = FP32_STEPS if precision == "fp32" else None
        count = len((first_result(session.of(role)) or {}).get("loss_per_step", []))
        label = f"allowed: {limit:.0e}" + (f" in the first {last} steps" if last else "")
        if not lossless:
            lower.plot([1, last or count], [limit, limit], color="0.3", linestyle=":", linewidth=1.6, label=label)
        title = "float32, the timed runs" if precision == "fp32" else "float64, the runs that the verdict needs"
        upper.set_title("the timed runs, which lose something on purpose" if lossless else title)
        lower.set(xlabel="optimizer step", yscale="log")
        if not lossless:
            lower.legend(loc="lower right" if last else "center right", fontsize=8, frameon=True)
    axes[0][0].set_ylabel("loss of the global batch")
    axes[1][0].set_ylabel("largest relative difference\nfrom one process so far")
    axes[0][0].legend()
    what = "Loss: every launcher and rank count, and one lossless process" if lossless else ""
    drawn.suptitle(what or "Same loss: every launcher and rank count, and one process", fontsize=12)
    return both(drawn, folder, "loss", f"What never differs (0) is not drawn. {caption}")


def learning(session: Session, rows: list[Row], folder: Path, caption: str) -> list[Path]:
    """Loss and accuracy over the time since the command was typed, with the most ranks: for loops that differ step by step."""
    most = max(row.case.world_size for row in rows)
    drawn = figure(10, 4.8)
    axes = drawn.subplots(1, 2)
    for number, row in enumerate(row for row in rows if row.case.world_size == most):
        runs = sorted(session.of("timed", row.case), key=lambda sample: sample.wall_seconds)
        if not runs:
            continue
        found = runs[len(runs) // 2].result or {}
        seconds = [found["launch_seconds"] + end for end in found["epoch_end_seconds"]]
        style: dict[str, Any] = {"color": COLOURS[number], "marker": MARKERS[number], "markersize": 4}
        axes[0].plot(seconds, found["train_loss_per_epoch"], label=row.name, **style)
        if "eval_loss_per_epoch" in found:
            axes[0].plot(seconds, found["eval_loss_per_epoch"], linestyle="--", **style | {"markerfacecolor": "none"})
        if None not in found["eval_accuracy"]:
            axes[1].plot(seconds, [100 * accuracy for accuracy in found["eval_accuracy"]], **style)
    axes[0].set(ylabel="train loss of each epoch; dashed: eval loss", yscale="log")
    axes[1].set(ylabel="eval accuracy (%)")
    for each in axes:
        each.set(xlabel="seconds since the command was typed", xlim=(0, None))
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    drawn.suptitle(f"Learning over time, {most} rank{'s' * (most > 1)}: the median run of each", fontsize=12)
    return both(drawn, folder, "learning", caption)


def _growing(axes: Axes, result: dict[str, Any], reference: dict[str, Any], **style: Any) -> None:
    """The largest relative difference up to each step, from the first that is not 0."""
    difference = itertools.accumulate(relative_differences(result["loss_per_step"], reference["loss_per_step"]), max)
    points = [(step, d) for step, d in enumerate(difference, 1) if d > 0]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def batch_sizes(points: list[dict[str, Any]], folder: Path, caption: str, target: float, rule: str) -> list[Path]:
    """Samples/s and time to the target accuracy over the batch size per rank, a line per launcher and world size."""
    drawn = figure(10, 4.6)
    left, right = drawn.subplots(1, 2, sharex=True)
    names = list(dict.fromkeys(p["name"] for p in points))
    sizes = sorted({p["batch_size"] for p in points})
    missed = False
    for number, name in enumerate(names):
        mine = [p for p in points if p["name"] == name]
        with_range(left, [(p["batch_size"], p["samples_per_second"]) for p in mine if p["samples_per_second"]], number, name)
        with_range(right, [(p["batch_size"], p["seconds_to_target"]) for p in mine if p["seconds_to_target"]], number, name)
        for p in mine:
            if not p["seconds_to_target"] and p["has_accuracy"]:
                missed = True
                right.plot(p["batch_size"], 0.04, "x", color=COLOURS[number], transform=right.get_xaxis_transform())
    left.set(xlabel="batch size (samples per rank and forward pass)", ylabel="samples/s")
    right.set(xlabel="batch size (samples per rank and forward pass)", ylabel=f"training seconds to {target:.0%} accuracy")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
    left.legend()
    if not any(p["has_accuracy"] for p in points):
        right.text(0.5, 0.5, "this job has no accuracy", ha="center", transform=right.transAxes)
    drawn.suptitle(f"How large a batch? Learning rate scaled: {rule}", fontsize=12)
    note = " × did not reach it in the epochs given." if missed else ""
    return both(drawn, folder, "batch_sizes", f"{note} {caption}".strip())


def launch_times(
    rows: Sequence[LaunchTime], folder: Path, caption: str, launchers: Sequence[str], bare: Mapping[str, str], peers: Sequence[str]
) -> list[Path]:
    """Launch time by ranks, the launchers and what they are measured beside; each launcher against its bare script."""
    drawn = figure(11, 5)
    left, right = drawn.subplots(1, 2, width_ratios=[1.4, 1])
    sizes = sorted({r.case.world_size for r in rows})
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(launchers)}
    by_hand = {script: launcher for launcher, script in bare.items()}
    greys = itertools.cycle(("0.0", "0.35", "0.55", "0.7"))
    for number, name in enumerate(dict.fromkeys(r.case.launcher for r in rows)):
        points = [(r.case.world_size, r.seconds) for r in rows if r.case.launcher == name and r.seconds]
        if name in launchers:
            with_range(left, points, launchers.index(name), name, linewidth=2)
        elif name in by_hand:  # beside its launcher, told by the colour
            with_range(left, points, 0, None, color=colours[by_hand[name]], marker="", linestyle=":", capsize=0)
        else:
            style = "--" if name in peers else ":"
            with_range(left, points, number, name, color=next(greys), linestyle=style, markerfacecolor="white")
        ratios = [(r.case.world_size, r.times_bare) for r in rows if r.case.launcher == name and r.times_bare]
        if ratios:
            # A little apart, so that launchers that are equal can be told from each other.
            shift = 1 + 0.03 * (launchers.index(name) - (len(launchers) - 1) / 2)
            with_range(right, [(n * shift, s) for n, s in ratios], launchers.index(name), None)
    with_range(left, [], 0, "a launcher's\nbare script", color="0.5", marker="", linestyle=":", capsize=0)
    right.axhline(1, color="0.5", linewidth=0.8)
    right.axhline(BARE_LIMIT, color="black", linestyle=":", linewidth=1.2, label=f"allowed: {BARE_LIMIT}")
    right.legend(loc="best")
    left.set(yscale="log", ylabel="seconds (median and range)", title="Launch time")
    right.set(ylabel="times", title="A launcher against its bare script, paired")
    plain_seconds(left)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.tick_params(axis="x", which="minor", bottom=False)
        axes.set(xlabel="ranks")
    drawn.legend(*left.get_legend_handles_labels(), loc="outside right center")
    drawn.suptitle("From the command to the end of the first optimizer step on the slowest rank", fontsize=12)
    return both(drawn, folder, "peers", caption)


def plain_seconds(axes: Axes) -> None:
    """A logarithmic axis with plain numbers, also within a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
