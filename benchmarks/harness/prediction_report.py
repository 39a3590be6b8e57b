"""What a prediction tells, on the screen and as a picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from benchmarks.harness.plots import both, with_range
from benchmarks.harness.prediction import ASSUMPTIONS, MOST_RANKS, Prediction, described, sentences
from benchmarks.harness.report import OVERSUBSCRIBED, cell, table
from common.plots import COLOURS, figure

STYLES = ("-", "--", ":", "-.")


def show(console: Console, found: Prediction) -> None:
    """Where the model stops gaining, and how far prediction and measurement differ."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    console.print()
    console.print("Prediction from compute time, α and β", style="bold", highlight=False)
    say(described(found.model))
    for sentence in sentences(found):
        say(sentence)
    say(f"It assumes that {'; '.join(ASSUMPTIONS)}.\n")
    told = [c for c in found.compared if c.ratio is not None]
    if told:
        made = table(
            "Prediction against measurement: speedup of the steps after the first, without evaluation",
            "launcher", "ranks", "gradients", "link", "measured", "predicted", "predicted / measured",
        )  # fmt: skip
        for c in told:
            assert c.known and c.predicted is not None
            ranks = f"{c.row.case.world_size}{OVERSUBSCRIBED if c.row.oversubscribed else ''}"
            made.add_row(c.row.name, ranks, c.way, c.known.link.name, cell(c.measured), f"{c.predicted:.2f}", f"{c.ratio:.2f}")
        console.print(made)
        if any(c.row.oversubscribed for c in told):
            say(f"{OVERSUBSCRIBED} more ranks × threads than cores, which no prediction knows of.")
        console.print()
    for way in sorted({c.way for c in found.compared if c.ratio is None}):
        say(f"The link of {way} was not measured here, so nothing is held against its runs: python benchmarks/collectives.py.")


def picture(found: Prediction, folder: Path, caption: str, threads: int) -> list[Path]:
    """Measured speedups with their ranges, and the predicted ones, a line a link, to 1,024 ranks; the ring marks the last gain."""
    drawn = figure(11, 6.2)
    axes = drawn.add_subplot()
    every = range(1, MOST_RANKS + 1)
    model = found.model
    lowest, highest = 1.0, 1.0
    for number, known in enumerate(found.known):
        values = [model.speedup(known.link, n) for n in every]
        style = STYLES[number // len(COLOURS) % len(STYLES)] if known.here else "--"
        colour = COLOURS[number % len(COLOURS)]
        ranks, speedup = model.most(known.link)
        gain = "never gains" if ranks == 1 else f"most: {speedup:.3g} times at {ranks:,} ranks"
        label = f"predicted: {known.name}\n({gain})"
        axes.plot(list(every), values, color=colour, linestyle=style, linewidth=1.5, label=label)
        axes.plot(ranks, speedup, "o", markersize=9, markerfacecolor="none", markeredgecolor=colour)
        lowest, highest = min(lowest, *values), max(highest, *values)
    launchers = list(dict.fromkeys(c.row.name for c in found.compared))
    for number, launcher in enumerate(launchers):
        # A little apart, so that launchers that are equal can be told from each other.
        shift = 1 + 0.05 * (number - (len(launchers) - 1) / 2)
        mine = [c for c in found.compared if c.row.name == launcher]
        points = [(c.row.case.world_size * shift, c.measured) for c in mine]
        ways = "/".join(dict.fromkeys(c.way for c in mine))
        label = f"measured: {launcher},\n--sync {ways}"
        with_range(axes, points, number, label, color="0.15", linestyle="", markerfacecolor="white", markersize=6)
        lowest, highest = min(lowest, *(s.low for _, s in points)), max(highest, *(s.high for _, s in points))
    axes.plot([1, MOST_RANKS], [1, MOST_RANKS], color="0.5", linestyle=":", label="ideal: as many times as ranks")
    axes.axhline(1, color="0.5", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [2**k for k in range(MOST_RANKS.bit_length())]
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.set_xlim(0.9, MOST_RANKS * 1.1)
    axes.set_ylim(max(lowest / 1.5, 0.001), highest * 2)
    axes.minorticks_off()
    one = f"one process with {threads} thread{'s' * (threads > 1)}"
    axes.set(xlabel="ranks", ylabel=f"speedup over {one} (times{', N·t(1)/t(N)' if model.weak else ''})")
    kind = "weak" if model.weak else "strong"
    drawn.suptitle(f"Speedup of a training step, measured and predicted, {kind} scaling", fontsize=12)
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    more = any(c.row.oversubscribed for c in found.compared)
    note = " Measured with more ranks × threads than cores where ranks exceed them." if more else ""
    return both(
        drawn,
        folder,
        "prediction",
        f"Ring: the most that is gained. {described(model)} Assumed: {'; '.join(ASSUMPTIONS)}.{note} {caption}",
    )
