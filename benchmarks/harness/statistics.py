"""Medians with ranges, and ratios of runs that were made side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NOISY = 0.25  # a range above a quarter of the median


@dataclass(frozen=True)
class Spread:
    """The median of some samples with their range."""

    median: float
    low: float
    high: float
    samples: int

    @property
    def noisy(self) -> bool:
        """Whether the range is too wide to tell small differences."""
        return self.high - self.low > NOISY * abs(self.median)

    def text(self, digits: int = 2) -> str:
        """``median (low-high)``."""
        if self.samples == 1:
            return f"{self.median:,.{digits}f}"
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f}–{self.high:,.{digits}f})"

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        return {"median": self.median, "low": self.low, "high": self.high, "samples": self.samples}


def spread(values: Sequence[float | None]) -> Spread | None:
    """The spread of the values that are there; None if there is none."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    return Spread(statistics.median(there), min(there), max(there), len(there))


def paired_ratio(above: dict[int, float], below: dict[int, float]) -> Spread | None:
    """The spread of above/below over the repeats that both have: what drifts with the machine cancels within a repeat."""
    return spread([above[r] / below[r] for r in sorted(above.keys() & below.keys()) if below[r] > 0])
