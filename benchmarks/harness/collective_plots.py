"""The picture of collectives.py: time and algorithm bandwidth by size, with the memory copies that bound them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.bandwidth import size_text
from benchmarks.harness.collective_report import Fitted, Row, ceiling, is_copy, is_over_link, link_bus_bytes_per_s
from benchmarks.harness.links import Fit
from benchmarks.harness.plots import both, with_range
from benchmarks.harness.statistics import Spread
from common.plots import COLOURS, figure

COPY_STYLES = {
    "neighbour": ("black", "--", "ceiling: copy of the\nneighbour's bytes"),
    "hand_over": ("0.35", "-.", "hand-over: written for\nthe neighbour, copied\nby it"),
    "own": ("0.55", ":", "copy in own\nmemory"),
}


def draw(rows: Sequence[Row], fitted: Sequence[Fitted], folder: Path, caption: str, cores: int) -> list[Path]:
    """A picture a number of ranks: a column a collective, time above, algorithm bandwidth below; the fit as a thin line."""
    paths = []
    worlds = [n for n in dict.fromkeys(row.case.world_size for row in rows) if any(_of(rows, n))]
    for n in worlds:
        name = "collectives" if n == max(worlds) else f"collectives_{n}_rank{'s' * (n > 1)}"
        paths += _one(rows, fitted, n, folder, name, caption, cores)
    return paths


def _of(rows: Sequence[Row], world_size: int) -> list[Row]:
    return [row for row in rows if row.case.world_size == world_size and not is_copy(row)]


def _one(rows: Sequence[Row], fitted: Sequence[Fitted], n: int, folder: Path, name: str, caption: str, cores: int) -> list[Path]:
    mine = _of(rows, n)
    kinds, cases = list(dict.fromkeys(r.collective for r in mine)), list(dict.fromkeys(r.case for r in mine))
    drawn = figure(2.6 + 3.1 * len(kinds), 7)
    axes = drawn.subplots(2, len(kinds), sharex=True, sharey="row", squeeze=False)
    for column, kind in enumerate(kinds):
        upper, lower = axes[0][column], axes[1][column]
        for number, case in enumerate(cases):
            points = [row for row in mine if (row.case, row.collective) == (case, kind)]
            label = case.title if column == 0 else None
            with_range(upper, [(r.n_bytes, _scaled(r.seconds, 1e6)) for r in points], number, label, linestyle="none")
            with_range(lower, [(r.n_bytes, _scaled(r.algorithm, 1e-9)) for r in points], number, None)
            if (most := link_bus_bytes_per_s(case)) and points and points[0].factor:
                level = most / points[0].factor / 1e9
                lower.axhline(level, color=COLOURS[number % len(COLOURS)], linestyle=":", linewidth=1.4)
            found = next((f.fit for f in fitted if (f.case, f.collective) == (case, kind)), None)
            upper.plot(*_line(found, points), color=COLOURS[number % len(COLOURS)], linewidth=0.9)
        for copy, (colour, style, label) in COPY_STYLES.items():
            if bound := ceiling(rows, copy, kind, n):
                shown = label if column == 0 else None
                upper.plot([x for x, _ in bound], [r.seconds.median * 1e6 for _, r in bound], style, color=colour, label=shown)
                lower.plot([x for x, _ in bound], [x / r.seconds.median / 1e9 for x, r in bound], style, color=colour)
        upper.set_title(kind)
        for each in (upper, lower):
            each.set(xscale="log", yscale="log")
        sizes = sorted({r.size for r in mine})
        ticks = sizes[:: max(1, -(-len(sizes) // 5))]
        lower.set_xticks(ticks, [size_text(x) for x in ticks], fontsize=8, rotation=30)
        lower.minorticks_off()
        lower.set(xlabel="size", xlim=(sizes[0] / 1.6, sizes[-1] * 1.6))
    axes[0][0].set_ylabel("µs (median and range); line: α + n/β")
    axes[1][0].set_ylabel("algorithm bandwidth (GB/s)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    bounds = sum(label in [text for *_, text in COPY_STYLES.values()] for label in labels)  # plain lines come first; put them last
    drawn.legend(handles[bounds:] + handles[:bounds], labels[bounds:] + labels[:bounds], loc="outside right center", fontsize=9)
    crowded = ", more than cores" if n > cores else ""
    hosts = " on several hosts, by the rate of their links" if any(is_over_link(case) for case in cases) else ""
    drawn.suptitle(f"Collectives of {n} rank{'s' * (n > 1)}{hosts}{crowded}, float32, one thread each", fontsize=12)
    note = "Sizes and algorithm bandwidth as nccl-tests defines them."
    crosses = "(all_reduce 2(N-1)/N of the size, all_gather and reduce_scatter (N-1)/N, broadcast all of it)"
    if any(is_copy(row) for row in rows):
        note += f" Ceiling: every rank at once copies what must cross to it {crosses}."
    if any(link_bus_bytes_per_s(case) for case in cases):
        note += f" Dotted: what must cross to a rank {crosses} at the link's rate."
    return both(drawn, folder, name, f"{note} {caption}")


def _scaled(s: Spread, factor: float) -> Spread:
    return Spread(s.median * factor, s.low * factor, s.high * factor, s.samples)


def _line(found: Fit | None, points: Sequence[Row]) -> tuple[list[float], list[float]]:
    """(bytes, µs) of the fit; from point to point where there is none."""
    low, high = min(r.n_bytes for r in points), max(r.n_bytes for r in points)
    if not found:
        return [r.n_bytes for r in points], [r.seconds.median * 1e6 for r in points]
    xs = [low * (high / low) ** (i / 60) for i in range(61)]
    return xs, [found.seconds(x) * 1e6 for x in xs]
