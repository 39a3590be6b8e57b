"""From the seconds of single calls to figures: time, bandwidths, α and β, and how near an all-reduce comes to a copy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness.bandwidth import bus_factor, size_text
from benchmarks.harness.cases import Case
from benchmarks.harness.cluster import bytes_per_s, parse_rate
from benchmarks.harness.collective_runs import COPIES, MEMORY_COPY
from benchmarks.harness.links import FEWEST_SIZES, Fit, Link, fit
from benchmarks.harness.report import OVERSUBSCRIBED, show_noisy, table
from benchmarks.harness.session import Sample, Session
from benchmarks.harness.statistics import Spread, paired_ratio, spread

JUDGED = 2**22  # bytes: the all-reduce that the sentences are about
COPIES_IN_WORDS = {
    "neighbour": "a copy of the neighbour's bytes",
    "hand_over": "a hand-over (writing included)",
    "own": "a copy in own memory",
}
SLOWER = "gloo"  # the way that the others are measured against


@dataclass(frozen=True)
class Row:
    """One way's times of one collective (or copy) and size."""

    case: Case
    collective: str
    size: int
    """Bytes that were asked for."""
    n_bytes: int
    """Bytes as nccl-tests counts them."""
    by_repeat: dict[int, float]
    """{repeat: median seconds of its calls, each the slowest rank's}."""

    @property
    def seconds(self) -> Spread:
        """Over the repeats."""
        found = spread(list(self.by_repeat.values()))
        assert found
        return found

    @property
    def algorithm(self) -> Spread:
        """Algorithm bandwidth (of a copy: its bandwidth) in bytes per second."""
        s = self.seconds
        return Spread(self.n_bytes / s.median, self.n_bytes / s.high, self.n_bytes / s.low, s.samples)

    @property
    def factor(self) -> float:
        """Bus / algorithm bandwidth."""
        return bus_factor(self.collective, self.case.world_size)

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        told = {
            "way": self.case.title,
            "world_size": self.case.world_size,
            "collective": self.collective,
            "size": self.size,
            "bytes": self.n_bytes,
            "seconds": self.seconds.as_json(),
        }
        if self.case.launcher == MEMORY_COPY:
            return told | {"gb_per_s": self.algorithm.median / 1e9}
        bandwidth = self.algorithm.median / 1e9
        return told | {"algorithm_gb_per_s": bandwidth, "bus_gb_per_s": bandwidth * self.factor}


def summarise(session: Session, role: str = "timed") -> list[Row]:
    """A row a case, collective and size of the runs of ``role``, in the order in which they were first measured."""
    found: dict[tuple[Case, str, int], Row] = {}
    for sample in sorted(session.of(role), key=_order):
        assert sample.result
        for each in sample.result["measured"]:
            key = (sample.job.case, each["collective"], each["size"])
            row = found.setdefault(key, Row(*key, each["bytes"], {}))
            row.by_repeat[sample.job.repeat] = statistics.median(each["microseconds"]) / 1e6
    return list(found.values())


def _order(sample: Sample) -> tuple[int, bool]:
    return sample.job.case.world_size, sample.job.case.launcher == MEMORY_COPY


def is_copy(row: Row) -> bool:
    """Whether it is of the ceiling."""
    return row.case.launcher == MEMORY_COPY


def ceiling(rows: Sequence[Row], kind: str, collective: str, world_size: int) -> list[tuple[int, Row]]:
    """[(bytes of the collective, the copy that it cannot beat)]: a copy of n bytes bounds n / bus factor bytes of it."""
    factor = bus_factor(collective, world_size)
    mine = [row for row in rows if is_copy(row) and row.collective == kind and row.case.world_size == world_size]
    return [(round(row.n_bytes / factor), row) for row in mine if factor]


# ------------------------------------------------------------------------------------------------------- α and β


@dataclass(frozen=True)
class Fitted:
    """α and β of one way's collective."""

    case: Case
    collective: str
    fit: Fit

    def as_json(self) -> dict[str, Any]:
        """For a result file, which ``links.read`` reads."""
        told = {"way": self.case.title, "world_size": self.case.world_size, "collective": self.collective} | self.fit.as_json()
        if self.collective == "all_reduce" and self.case.world_size > 1:
            told["link"] = Link.measured(self.case.title, self.fit, self.case.world_size).as_json()
        return told


def fits(rows: Sequence[Row]) -> list[Fitted]:
    """A fit a way, number of ranks and collective, of the medians; none where there are too few sizes."""
    found = []
    for case, collective in dict.fromkeys((row.case, row.collective) for row in rows if not is_copy(row)):
        mine = [row for row in rows if (row.case, row.collective) == (case, collective)]
        if len({row.n_bytes for row in mine}) >= FEWEST_SIZES:
            times = [row.seconds.median for row in mine]
            found.append(Fitted(case, collective, fit([row.n_bytes for row in mine], times)))
    return found


# ------------------------------------------------------------------------------------------- beside gloo and a copy


@dataclass(frozen=True)
class Standing:
    """How one way's all-reduce of ``JUDGED`` bytes stands."""

    row: Row
    times_slower_way: Spread | None
    """How many times gloo's bandwidth: ratio of the medians; low and high of the pairs within a repeat."""
    of_copies: dict[str, Spread]
    """Its bandwidth over what each kind of copy allows, likewise."""

    def sentence(self) -> str:
        """In words."""
        n = self.row.case.world_size
        head = f"all_reduce of {size_text(self.row.n_bytes)}, {n} rank{'s' * (n > 1)}, {self.row.case.title}"
        told = []
        if self.times_slower_way:
            told.append(f"{self.times_slower_way.text(1)} times {SLOWER}'s bandwidth")
        for kind, s in self.of_copies.items():
            share = f"{s.median:.0%}{f' ({s.low:.0%}–{s.high:.0%})' * (s.samples > 1)}"
            told.append(f"{share} of {COPIES_IN_WORDS[kind]}")
        return f"{head}: {_gb(gb := self.row.algorithm.median / 1e9, 10 * gb)} GB/s{''.join(f', {text}' for text in told)}."

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        return {
            "way": self.row.case.title,
            "world_size": self.row.case.world_size,
            "bytes": self.row.n_bytes,
            "algorithm_gb_per_s": self.row.algorithm.median / 1e9,
            f"times_{SLOWER}": self.times_slower_way and self.times_slower_way.as_json(),
            "of_copy": {kind: s.as_json() for kind, s in self.of_copies.items()},
        }


def standings(rows: Sequence[Row]) -> list[Standing]:
    """One a way and number of ranks, of the all-reduce nearest to ``JUDGED`` bytes; copies of the same size bound it."""
    reduced = [row for row in rows if row.collective == "all_reduce"]
    if not reduced:
        return []
    size = min({row.size for row in reduced}, key=lambda s: (abs(s - JUDGED), s))
    found = []
    for row in (r for r in reduced if r.size == size):
        n = row.case.world_size
        slower = next((r for r in reduced if r.case == Case(SLOWER, n, 1) and r.size == size), None)
        copies = {r.collective: r for r in rows if is_copy(r) and r.case.world_size == n and r.size == size and n > 1}
        # A copy of n bytes bounds an all-reduce of n / factor bytes; at this size copying is in proportion.
        shares = {kind: _ratio(copies[kind], row, row.factor) for kind in COPIES[::-1] if kind in copies}
        times = _ratio(slower, row) if slower and slower is not row else None
        found.append(Standing(row, times, {kind: share for kind, share in shares.items() if share}))
    return found


def _ratio(above: Row, below: Row, factor: float = 1.0) -> Spread | None:
    paired = paired_ratio(above.by_repeat, below.by_repeat)
    if not paired:
        return None
    ratio = above.seconds.median / below.seconds.median
    return Spread(ratio * factor, paired.low * factor, paired.high * factor, paired.samples)


def is_over_link(case: Case) -> bool:
    """Whether its ranks are on several hosts; its variant is their links' rate then."""
    try:
        return bool(parse_rate(case.variant))
    except ValueError:
        return False


def link_bus_bytes_per_s(case: Case) -> float | None:
    """What the link of ``case`` can carry, where it is one of a known rate: a bound of bus bandwidth."""
    return bytes_per_s(case.variant) if is_over_link(case) else None


def link_sentences(rows: Sequence[Row]) -> list[str]:
    """How much of each link's rate the largest all-reduce over it gets."""
    told = []
    for case in dict.fromkeys(row.case for row in rows if link_bus_bytes_per_s(row.case)):
        mine = [row for row in rows if row.case == case and row.collective == "all_reduce"]
        bound = link_bus_bytes_per_s(case)
        if mine and bound:
            row = max(mine, key=lambda each: each.n_bytes)
            share = row.algorithm.median * row.factor / bound
            told.append(f"all_reduce of {size_text(row.n_bytes)}, {case.name}: {share:.0%} of what the link's rate allows.")
    return told


# -------------------------------------------------------------------------------------------------------- on the screen


def tables(rows: Sequence[Row], fitted: Sequence[Fitted], repeats: int, cores: int) -> list[tuple[str, Table]]:
    """(title, table): one a collective and number of ranks, with the copies; then α and β."""
    made = []
    each = f"median of {repeats} runs ± the farthest" if repeats > 1 else "1 run"
    for n in dict.fromkeys(row.case.world_size for row in rows):
        here = [row for row in rows if row.case.world_size == n]
        ranks = f"{n}{OVERSUBSCRIBED if n > cores else ''} rank{'s' * (n > 1)}"
        for collective in dict.fromkeys(row.collective for row in here if not is_copy(row)):
            mine = [row for row in here if row.collective == collective]
            cases = list(dict.fromkeys(row.case for row in mine))
            columns = [text for case in cases for text in (f"{case.title}\nµs", "alg.\nGB/s", "bus\nGB/s")]
            shown = table("", "size", *columns)
            for size in dict.fromkeys(row.size for row in mine):
                cells = []
                for case in cases:
                    found = next((row for row in mine if (row.case, row.size) == (case, size)), None)
                    cells += _cells(found) if found else ["–"] * 3
                shown.add_row(size_text(size), *cells)
            made.append((f"{collective}, {ranks}: slowest rank, {each}; algorithm and bus bandwidth", shown))
        copies = [row for row in here if is_copy(row)]
        if copies:
            kinds = list(dict.fromkeys(row.collective for row in copies))
            columns = [text for kind in kinds for text in (f"{kind}\nµs", "GB/s")]
            shown = table("", "size", *columns)
            for size in dict.fromkeys(row.size for row in copies):
                pairs = [next(row for row in copies if (row.collective, row.size) == (kind, size)) for kind in kinds]
                shown.add_row(size_text(size), *(text for row in pairs for text in _cells(row)[:2]))
            made.append((f"Memory copy, {ranks} at once: slowest rank, {each}; bytes copied per second", shown))
    if fitted:
        shown = table("", "collective", "way", "ranks", "α µs", "β GB/s", "median error", "largest error")
        for f in fitted:
            beta = _gb(b := f.fit.beta_bytes_per_s / 1e9, 10 * b) if f.fit.beta_bytes_per_s < float("inf") else "∞"
            errors = (f"{f.fit.median_error:.0%}", f"{f.fit.largest_error:.0%}")
            shown.add_row(f.collective, f.case.title, str(f.case.world_size), f"{f.fit.alpha_s * 1e6:.1f}", beta, *errors)
        made.append(("t = α + n/β, fitted to the medians; errors relative to each time", shown))
    return made


def _cells(row: Row) -> list[str]:
    s = row.seconds
    bandwidth = row.algorithm.median / 1e9
    bus = "" if is_copy(row) else _gb(bandwidth * row.factor, bandwidth) if row.factor else "–"
    time = f"{s.median * 1e6:,.{0 if s.median >= 100e-6 else 1}f}"
    if s.samples > 1:  # the whole range, in every cell, would not fit on a screen
        farthest = max(s.high - s.median, s.median - s.low) / s.median
        time += f" ±{farthest:>3.0%}" if farthest < 9.995 else " ±>999%"
    return [time, _gb(bandwidth, bandwidth), bus]


def _gb(value: float, beside: float) -> str:
    """Gigabytes per second with the digits that ``beside`` asks for; slow links need more."""
    return f"{value:.{2 if beside >= 1 else 3 if beside >= 0.1 else 4}f}"


def tell(console: Console, rows: Sequence[Row], standing: Sequence[Standing], sizes: int, cores: int) -> None:
    """The sentences that follow from the tables."""
    for each in standing:
        console.print(each.sentence(), markup=False, highlight=False)
    if sizes < FEWEST_SIZES:
        console.print(f"No α and β: a fit needs {FEWEST_SIZES} sizes or more.", markup=False, highlight=False)
    if any(row.case.world_size > cores for row in rows):
        console.print(f"{OVERSUBSCRIBED} oversubscribed: more ranks than the {cores} cores here.", markup=False, highlight=False)
    noisy = []
    for case in dict.fromkeys(row.case for row in rows):
        mine = [row for row in rows if row.case == case]
        if sum(row.seconds.noisy for row in mine) > len(mine) / 4:
            noisy.append(case.name)
    if noisy:
        show_noisy(console, noisy)
