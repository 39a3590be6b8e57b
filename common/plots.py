"""Drawing: one style for every picture, and the training curves. matplotlib is imported only when a picture is asked for."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for colour-blind readers: https://jfly.uni-koeln.de/color/
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Where seven are too few: Paul Tol's "muted" ten, likewise chosen: https://sronpersonalpages.nl/~pault/
TEN_COLOURS = ("#DDDDDD", "#332288", "#88CCEE", "#CC6677", "#117733", "#DDCC77", "#44AA99", "#882255", "#999933", "#AA4499")


def figure(width: float = 8.0, height: float = 4.5) -> Figure:
    """An empty figure (inches) in the project's style; no window system is needed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(
        {
            "font.size": 10,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "legend.frameon": False,
            "svg.hashsalt": "launchlab",  # the same data give the same file
        }
    )
    return Figure(figsize=(width, height), layout="constrained")


def save(drawn: Figure, path: str | Path, caption: str = "") -> None:
    """Writes ``drawn`` with ``caption`` below it, in the format that the name asks for."""
    if caption:
        drawn.supxlabel("\n".join(textwrap.wrap(caption, int(drawn.get_figwidth() * 16.5))), fontsize=7.5, color="0.35", x=0.5)
    kind = Path(path).suffix[1:]
    metadata = {"Date": None} if kind == "svg" else None
    write_whole(path, lambda stream: drawn.savefig(stream, format=kind, dpi=150, metadata=metadata))


@dataclass(frozen=True)
class Curves:
    """Of a training, a number an epoch."""

    train_loss: Sequence[float]
    eval_loss: Sequence[float]
    accuracy: Sequence[float | None]
    """Of the evaluation data, 0 to 1; None where there are no classes."""
    learning_rate: Sequence[float]
    """In the epoch's last step."""
    samples_per_second: Sequence[float | None]
    """While it trained; None for an epoch of one step, the first."""


def training_curves(path: str | Path, curves: Curves, title: str) -> None:
    """Losses, and accuracy where there is one; below them the learning rate and the speed."""
    from matplotlib.ticker import MaxNLocator

    drawn = figure(height=6.0)
    epochs = range(1, len(curves.train_loss) + 1)
    grid = drawn.add_gridspec(2, 2, height_ratios=[2.2, 1])
    left, rate, speed = (drawn.add_subplot(place) for place in (grid[0, :], grid[1, 0], grid[1, 1]))
    _line(left, epochs, curves.train_loss, 0, "train loss")
    _line(left, epochs, curves.eval_loss, 1, "eval loss")
    left.set(xlabel="epoch", ylabel="loss (mean over samples)", title=title)
    if min(*curves.train_loss, *curves.eval_loss) > 0:
        left.set_yscale("log")
    lines = left.get_lines()
    if curves.accuracy and curves.accuracy[0] is not None:
        right = left.twinx()
        right.grid(False)
        right.spines["right"].set_visible(True)
        _line(right, epochs, [100 * (a or 0) for a in curves.accuracy], 2, "eval accuracy")
        right.set(ylabel="accuracy (%)")
        lines = [*lines, *right.get_lines()]
    drawn.legend(lines, [str(line.get_label()) for line in lines], loc="outside upper center", ncols=3)
    _line(rate, epochs, curves.learning_rate, 3, "")
    rate.set(xlabel="epoch", ylabel="learning rate")
    _line(speed, epochs, [float("nan") if s is None else s for s in curves.samples_per_second], 4, "")
    speed.set(xlabel="epoch", ylabel="samples/s")
    for axes in (rate, speed):
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
    for axes in (left, rate, speed):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    save(drawn, path)


def _line(axes: Any, x: Sequence[int], y: Sequence[float], number: int, label: str) -> None:
    axes.plot(x, y, color=COLOURS[number], marker=MARKERS[number], markersize=4, label=label)
