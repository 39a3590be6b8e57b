"""The picture of compare.py --nodes: speedup and step time against nodes, a column a link, measured and predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness.cluster import rate_text
from benchmarks.harness.node_summary import Found, Row, predicted_speedup
from benchmarks.harness.plots import both, plain_seconds, with_range
from benchmarks.harness.statistics import Spread
from common.plots import COLOURS, figure

BEYOND = 4  # predictions go to so many times the most nodes that were measured
SHARED = "0.93"


def draw(found: Found, folder: Path, caption: str, cores: int, threads: int, per_node: int) -> list[Path]:
    """A column a link: speedup above, the time of a step below; hollow and shaded where ranks share cores."""
    rates = [probe.rate for probe in found.probes if any(r.case.rate == probe.rate and r.case.nodes > 1 for r in found.rows)]
    drawn = figure(3.4 + 3.1 * len(rates), 7.4)
    axes = drawn.subplots(2, len(rates), sharex=True, sharey="row", squeeze=False, height_ratios=[1.25, 1])
    nodes = sorted({r.case.nodes for r in found.rows} | {1})
    most = max(nodes) * (BEYOND if found.models else 1)
    kinds = list(dict.fromkeys((r.case.launcher, r.case.way.title) for r in found.rows if r.case.world_size > 1))
    several = len({launcher for launcher, _ in kinds}) > 1
    highest = max(r.speedup.high for r in found.rows)
    for column, rate in enumerate(rates):
        upper, lower = axes[0][column], axes[1][column]
        for number, (launcher, title) in enumerate(kinds):
            rows = found.of(rate, title, launcher)
            label = (f"{launcher}, {title}" if several else title) if column == 0 else None
            # A little apart, so that points that are equal can be told from each other.
            shift = 1 + 0.035 * (number - (len(kinds) - 1) / 2)
            _points(upper, [(r, r.speedup) for r in rows], number, shift, label)
            _points(lower, [(r, _scaled(r.step_seconds, 1e3)) for r in rows], number, shift, None)
            line = _predicted(found, rate, rows, most, per_node)
            highest = max([highest, *(s for n, s, _ in line if n <= max(nodes) * 2)])
            upper.plot([n for n, *_ in line], [s for _, s, _ in line], "--", color=COLOURS[number % len(COLOURS)], linewidth=1.2)
            lower.plot([n for n, *_ in line], [t for *_, t in line], "--", color=COLOURS[number % len(COLOURS)], linewidth=1.2)
        ideal = [most ** (i / 60) for i in range(61)]
        upper.plot(
            ideal,
            ideal,
            color="0.5",
            linestyle=":",
            label="ideal: as many\ntimes as nodes" if not column and per_node == 1 else None,
        )
        upper.axhline(1, color="0.5", linewidth=0.8)
        fit = cores / (per_node * threads)  # nodes whose ranks have cores of their own
        for each in (upper, lower):
            each.set_xscale("log", base=2)
            each.set_xlim(0.85, most * 1.18)
            if fit < most:
                each.axvspan(max(0.85, fit * 1.19), most * 1.18, color=SHARED, zorder=0, linewidth=0)
            ticks = (
                [2**k for k in range(most.bit_length()) if 2**k <= most] if not set(nodes) - {2**k for k in range(12)} else nodes
            )
            each.set_xticks(ticks, [str(n) for n in ticks])
            each.minorticks_off()
        if fit < most:
            told = f"ranks share the {cores} core{'s' * (cores > 1)}"
            place = {"transform": upper.get_xaxis_transform(), "ha": "right", "va": "top"}
            upper.text(most * 1.12, 0.985, told, fontsize=8, color="0.35", **place)
        probe = next(p for p in found.probes if p.rate == rate)
        upper.set_title(f"link: {rate_text(rate)}\n(measured {probe.measured_text})", fontsize=10)
        lower.set(xlabel="nodes")
    lower = axes[1][0]
    axes[0][0].set_ylim(0, highest * 1.12)
    axes[0][0].set_ylabel(f"speedup: samples/s over those\nof one rank, {threads} thread{'s' * (threads > 1)} (times)")
    lower.set(yscale="log", ylabel="ms a step")
    plain_seconds(lower)
    if found.models:
        axes[0][0].plot([], [], "--", color="0.3", linewidth=1.2, label="predicted from α,\nβ and one rank's\ncompute time")
    if any(r.oversubscribed for r in found.rows):
        axes[0][0].plot(
            [], [], "o", color="0.3", markerfacecolor="white", label="hollow: measured,\nmore ranks × threads\nthan cores"
        )
    drawn.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    ranks = f", {per_node} ranks on each" if per_node > 1 else ""
    drawn.suptitle(f"Training on several hosts{ranks}: median and range, by link", fontsize=12)
    return both(drawn, folder, "nodes", f"{_note(found)} {caption}".strip())


def _note(found: Found) -> str:
    parts = sorted({r.case.way.passes for r in found.rows if r.case.way.passes > 1})
    told = [f"A step of --accumulate {k} is {k} backward passes, its batch {k} times as large." for k in parts]
    return " ".join(
        [*told, "Hosts of a virtual cluster (network namespaces, tc-tbf); predictions give each rank cores of its own."]
    )


def _points(axes: Any, points: list[tuple[Row, Spread]], number: int, shift: float, label: str | None) -> None:
    """Medians with ranges, joined by a thin line; hollow where cores are shared."""
    ours = [(r.case.nodes * shift, s) for r, s in points if not r.oversubscribed]
    shared = [(r.case.nodes * shift, s) for r, s in points if r.oversubscribed]
    every = sorted([*ours, *shared], key=lambda each: each[0])
    axes.plot([x for x, _ in every], [s.median for _, s in every], color=COLOURS[number % len(COLOURS)], linewidth=1.2)
    with_range(axes, ours, number, label, linestyle="none", markersize=6)
    with_range(axes, shared, number, None, linestyle="none", markersize=6, markerfacecolor="white")


def _predicted(found: Found, rate: str, rows: list[Row], most: int, per_node: int) -> list[tuple[float, float, float]]:
    """[(nodes, speedup, milliseconds a step)] of a way over a link, to ``most`` nodes."""
    link = found.links.get(rate)
    crossing = [r for r in rows if r.case.nodes > 1]
    if not link or not crossing or not (model := found.models.get(crossing[0].case.way.title)):
        return []
    line = []
    for n in range(1 if per_node == 1 else 2, most + 1):
        speedup = predicted_speedup(model, link, n * per_node, crossing[0].case.way.compress)
        line.append((float(n), speedup, 1e3 * model.compute_seconds(1) / speedup))
    return line


def _scaled(s: Spread, factor: float) -> Spread:
    return Spread(s.median * factor, s.low * factor, s.high * factor, s.samples)
