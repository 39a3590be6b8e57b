"""What moving bytes costs: t = α + n/β fitted to measured times, and what that says about an all-reduce of any number of ranks.

The prediction is the ring all-reduce's: n bytes over N ranks take 2(N-1) steps, in each of which every rank sends n/N bytes to its
neighbour, so t = 2(N-1)·(a + n/(N·b)) with a step's latency a and bandwidth b: a reduce-scatter, then a ring all-gather, of N-1
steps each, in Hockney's model of a message (Thakur, Rabenseifner, Gropp: Optimization of Collective Communication Operations in
MPICH, IJHPCA 19(1), 2005; their time of the additions is within b here). What was measured at N0 ranks as t = α + n/β gives
a = α / (2(N0-1)) and b = β·2(N0-1)/N0.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UsageError
from common.values import positive

FEWEST_SIZES = 3  # two determine α and β, and leave no error to judge them by


@dataclass(frozen=True)
class Fit:
    """t = α + n/β through measured times."""

    alpha_s: float
    """Seconds that nothing costs; 0 or more."""
    beta_bytes_per_s: float
    """Bytes per second; infinite if the size made no difference."""
    median_error: float
    """Of |t_fit - t| / t over the points."""
    largest_error: float
    points: int

    def seconds(self, n_bytes: float) -> float:
        """The fitted time of ``n_bytes``."""
        return self.alpha_s + n_bytes / self.beta_bytes_per_s

    def as_json(self) -> dict[str, Any]:
        """For a result file (an infinite β becomes null)."""
        return {
            "alpha_us": self.alpha_s * 1e6,
            "beta_gb_per_s": self.beta_bytes_per_s / 1e9,
            "median_error": self.median_error,
            "largest_error": self.largest_error,
            "points": self.points,
        }

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Fit:
        """What ``as_json`` wrote; KeyError, TypeError where it is something else."""
        beta = float("inf") if told["beta_gb_per_s"] is None else told["beta_gb_per_s"] * 1e9
        return cls(told["alpha_us"] / 1e6, beta, told["median_error"], told["largest_error"], told["points"])


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> Fit:
    """α and β of t = α + n/β that minimise the sum of ((t_fit - t)/t)², both 0 or more.

    Relative errors, so that 64 MB, whose time is thousands of times that of 1 KB, does not decide alone: with them α is what small
    messages cost, β what large ones do.

    Args:
        sizes: bytes.
        seconds: the time of each, above 0.

    Raises:
        ValueError: fewer than ``FEWEST_SIZES`` different sizes, or times that are not above 0.
    """
    if len(sizes) != len(seconds) or len(set(sizes)) < FEWEST_SIZES:
        raise ValueError(f"a fit of α and β needs {FEWEST_SIZES} sizes or more, each with its time")
    if not all(t > 0 for t in seconds):
        raise ValueError("a fit of α and β needs times above 0")
    # Each equation α·u + n/β·u = 1 with u = 1/t, by the normal equations in (α, 1/β).
    rows = [(1 / t, n / t) for n, t in zip(sizes, seconds, strict=True)]
    uu, uv, vv = (sum(a * b for a, b in pairs) for pairs in ([(u, u) for u, _ in rows], rows, [(v, v) for _, v in rows]))
    su, sv = sum(u for u, _ in rows), sum(v for _, v in rows)
    determinant = uu * vv - uv * uv
    alpha, per_byte = (su * vv - sv * uv) / determinant, (sv * uu - su * uv) / determinant
    if alpha < 0:  # of two unknowns that may not be negative, one is 0 then
        alpha, per_byte = 0.0, sv / vv
    elif per_byte < 0:
        alpha, per_byte = su / uu, 0.0
    errors = [abs(alpha * u + per_byte * v - 1) for u, v in rows]
    beta = 1 / per_byte if per_byte else float("inf")
    return Fit(alpha, beta, statistics.median(errors), max(errors), len(rows))


@dataclass(frozen=True)
class Link:
    """What carries gradients between ranks, as one step of a ring all-reduce sees it."""

    name: str
    alpha_s: float
    """Latency of one step."""
    beta_bytes_per_s: float
    """Bandwidth of one step, of each rank."""
    fit: Fit | None = None
    """The all-reduce times that it comes from; None where it was given, not measured."""
    ranks: int | None = None
    """The number of ranks of that measurement."""

    @classmethod
    def measured(cls, name: str, all_reduce: Fit, ranks: int) -> Link:
        """The link behind the all-reduce times of ``ranks`` (2 or more) ranks; it gives back the fit's times at that number."""
        if ranks < 2:
            raise ValueError("a link needs 2 ranks or more")
        steps = 2 * (ranks - 1)
        return cls(name, all_reduce.alpha_s / steps, all_reduce.beta_bytes_per_s * steps / ranks, all_reduce, ranks)

    def all_reduce_seconds(self, n_bytes: float, ranks: int) -> float:
        """The predicted time of a ring all-reduce: 2(N-1)·(a + n/(N·b)); 0 for one rank."""
        return 2 * (ranks - 1) * (self.alpha_s + n_bytes / (ranks * self.beta_bytes_per_s))

    def as_json(self) -> dict[str, Any]:
        """For a result file (an infinite β becomes null)."""
        return {
            "name": self.name,
            "step_alpha_us": self.alpha_s * 1e6,
            "step_beta_gb_per_s": self.beta_bytes_per_s / 1e9,
            "ranks": self.ranks,
            "fit": self.fit and self.fit.as_json(),
        }


def parse_link(text: str) -> Link:
    """A link given as ``ALPHA_US,GBIT``: microseconds of latency a message, and gigabits (10⁹) per second.

    Raises:
        ValueError: its text says what is allowed.
    """
    alpha, comma, gigabits = text.partition(",")
    try:
        if not comma:
            raise ValueError
        return Link(f"{alpha.strip()} µs, {gigabits.strip()} Gbit/s", positive(alpha) / 1e6, positive(gigabits) * 1e9 / 8)
    except ValueError:
        raise ValueError("ALPHA_US,GBIT, two numbers above 0: microseconds a message, gigabits per second (25,10)") from None


def read(path: str | Path, ranks: int | None = None) -> dict[str, Link]:
    """The link of each way in a collectives.json, from its all-reduce.

    Args:
        path: the file, or the folder it is in.
        ranks: of several numbers of ranks that a way was measured at, this one if it is there; by default the fewest, 2 or more.

    Raises:
        UsageError: there is no such file, or it is none of collectives.py's.
    """
    path = Path(path)
    path = path / "collectives.json" if path.is_dir() else path
    remedy = "python benchmarks/collectives.py writes one"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        found = [(f["way"], f["world_size"], Fit.from_json(f)) for f in told["fits"] if f["collective"] == "all_reduce"]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path}: is no collectives.json; {remedy}") from None
    links: dict[str, Link] = {}
    for way, world_size, fitted in sorted(found, key=lambda each: (each[1] != ranks, each[1])):
        if world_size > 1:
            links.setdefault(way, Link.measured(way, fitted, world_size))
    return links
