"""What a way that loses something costs: its loss and accuracy against one process that loses nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.parity import FP32_STEPS, LOSSY, relative_differences
from common.config import TrainConfig

LOSSLESS = "lossless"
"""The role of the runs of one process in float32, which sends nothing."""


def is_lossy(config: TrainConfig) -> bool:
    """Whether runs of ``config`` lose something on purpose."""
    return config.compress is not None or config.precision in LOSSY


@dataclass(frozen=True)
class Lost:
    """The difference of one run from one lossless process."""

    curve: float | None
    """Largest relative difference of the first 20 steps' loss."""
    train_loss: float | None
    """Of the last epoch, relative: above 0 is worse."""
    accuracy_points: float | None
    """Of the last evaluation, in percentage points: below 0 is worse; None where the job has no accuracy."""

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        return {"curve_difference": self.curve, "train_loss_difference": self.train_loss, "accuracy_points": self.accuracy_points}


def lost(result: dict[str, Any] | None, reference: dict[str, Any] | None) -> Lost | None:
    """What ``result`` has lost against ``reference``; None if one of them is not there."""
    if result is None or reference is None:
        return None

    def last(of: dict[str, Any], name: str) -> float | None:
        values = of.get(name) or [None]
        return None if values[-1] is None else float(values[-1])

    curves = (r.get("loss_per_step", [])[:FP32_STEPS] for r in (result, reference))
    losses = last(result, "train_loss_per_epoch"), last(reference, "train_loss_per_epoch")
    accuracies = last(result, "eval_accuracy"), last(reference, "eval_accuracy")
    return Lost(
        max(relative_differences(*curves), default=None),
        None if losses[0] is None or not losses[1] else losses[0] / losses[1] - 1,
        None if accuracies[0] is None or accuracies[1] is None else 100 * (accuracies[0] - accuracies[1]),
    )


def sentence(found: Sequence[Lost]) -> str:
    """The widest of all differences, in words."""
    words = []
    if curves := [each.curve for each in found if each.curve is not None]:
        words.append(f"the loss of the first {FP32_STEPS} steps by at most {max(curves):.1e} of it")
    if losses := [each.train_loss for each in found if each.train_loss is not None]:
        words.append(f"the last epoch's train loss by {max(losses, key=abs):+.2%}")
    if points := [each.accuracy_points for each in found if each.accuracy_points is not None]:
        words.append(f"the accuracy by {max(points, key=abs):+.2f} points")
    return f"Against one lossless process (float32), the widest difference: {', '.join(words) or 'not measured'}."
