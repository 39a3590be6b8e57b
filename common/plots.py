"""Drawing: one style for every picture, and the training curves. matplotlib is imported only when a picture is asked for."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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


def training_curves(
    path: str | Path, train_loss: Sequence[float], eval_loss: Sequence[float], accuracy: Sequence[float | None], title: str
) -> None:
    """Train and eval loss, and accuracy where there is one, per epoch."""
    from matplotlib.ticker import MaxNLocator

    drawn = figure()
    epochs = range(1, len(train_loss) + 1)
    left = drawn.add_subplot()
    left.plot(epochs, train_loss, color=COLOURS[0], marker=MARKERS[0], markersize=4, label="train loss")
    left.plot(epochs, eval_loss, color=COLOURS[1], marker=MARKERS[1], markersize=4, label="eval loss")
    left.set(xlabel="epoch", ylabel="loss (mean over samples)", title=title)
    if min(*train_loss, *eval_loss) > 0:
        left.set_yscale("log")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    lines = left.get_lines()
    if accuracy and accuracy[0] is not None:
        right = left.twinx()
        right.grid(False)
        right.spines["right"].set_visible(True)
        right.plot(
            epochs, [100 * (a or 0) for a in accuracy], color=COLOURS[2], marker=MARKERS[2], markersize=4, label="eval accuracy"
        )
        right.set(ylabel="accuracy (%)")
        lines = [*lines, *right.get_lines()]
    left.legend(lines, [str(line.get_label()) for line in lines], loc="center right")
    save(drawn, path)
