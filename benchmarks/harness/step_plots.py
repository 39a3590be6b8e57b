"""The picture of steps.py: a bar a rank, cut into the parts of its step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.plots import both
from benchmarks.harness.step_parts import PARTS, REFERENCES, Row
from common.plots import COLOURS, figure

GAP = 0.6  # between ways, in bars
LABELS = {"communication": "communication that backward does not hide", "optimizer": "optimizer, zero_grad"}


def steps(rows: Sequence[Row], folder: Path, caption: str) -> list[Path]:
    """A panel a job; in it a group of bars a way, a bar a rank, in milliseconds; the whisker is the range of the whole step."""
    shown = [row for row in rows if row.ranks]
    jobs = list(dict.fromkeys(row.measured.job for row in shown))
    groups = list(dict.fromkeys((row.measured.title, row.measured.ranks) for row in shown))
    sizes = {ranks for _, ranks in groups}
    bars = {group: max(len(r.ranks) for r in shown if (r.measured.title, r.measured.ranks) == group) for group in groups}
    drawn = figure(2.4 + 3.6 * len(jobs), 1.7 + 0.2 * sum(bars.values()) + 0.13 * len(groups))
    panels = drawn.subplots(1, len(jobs), squeeze=False, sharey=True)[0]
    colours = dict(zip(PARTS, (COLOURS[4], COLOURS[0], COLOURS[5], COLOURS[1], COLOURS[2], "0.75"), strict=True))
    tops, y = {}, 0.0
    for group, count in bars.items():
        tops[group] = y
        y += count + GAP
    for axes, job in zip(panels, jobs, strict=True):
        for row in (r for r in shown if r.measured.job == job):
            for number, rank in enumerate(row.ranks):
                at, left = tops[row.measured.title, row.measured.ranks] + number, 0.0
                for part in PARTS:
                    width = 1000 * max(0.0, s.median if (s := rank[part]) else 0.0)
                    axes.barh(at, width, left=left, height=0.9, color=colours[part])
                    left += width
                if step := rank["step"]:
                    ends = [[1000 * (step.median - step.low)], [1000 * (step.high - step.median)]]
                    axes.errorbar(1000 * step.median, at, xerr=ends, color="black", capsize=2, linewidth=0.9, capthick=0.9)
        axes.set(title=job, xlabel="milliseconds a step")
        axes.set_xlim(left=0)
        axes.grid(False, axis="y")
        axes.set_axisbelow(True)
    ticks, names = [], []
    for group, count in bars.items():
        title = group[0] + (f", {group[1]} ranks" if len(sizes) > 1 else "")
        for number in range(count):
            ticks.append(tops[group] + number)
            one = count == 1
            what = "" if one else f"{'process' if group[0].replace(' ', '_') in REFERENCES else 'rank'} {number}"
            names.append(title if one else f"{title}   {what}" if number == 0 else what)
    panels[0].set_yticks(ticks, names, fontsize=8)
    panels[0].tick_params(axis="y", length=0)
    panels[0].set_ylim(y - GAP - 0.4, -0.6)
    handles = [axes.barh(0, 0, color=colours[part], label=LABELS.get(part, part)) for part in PARTS]
    drawn.legend(handles=handles, loc="outside upper center", ncols=min(6, 3 * len(jobs)), fontsize=8)
    return both(drawn, folder, "steps", f"Medians of parts, whiskers: the range of the repeats' median steps. {caption}")
