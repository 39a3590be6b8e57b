"""The speedup that a model of the step predicts: compute that shrinks with a rank's share, and an all-reduce that does not.

    t(N) = c(b) + a(S, N),   c(b) = c0 + c1·b,   a(S, N) = 2(N-1)·(α + S/(N·β))

c0 and c1 are fitted to steps of one process with a rank's threads at several batch sizes b; S is the bytes of gradients that a rank
sends, α and β are the link's (benchmarks/harness/links.py). Strong scaling: b = ⌈G/N⌉ samples of the slowest rank, at least 1, so
that compute gains nothing beyond N = G. Weak scaling: b stays, and the speedup is N·t(1)/t(N). ``ASSUMPTIONS``: what it leaves out.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import links, machine, mpis
from benchmarks.harness.cases import PEERS, Case
from benchmarks.harness.links import FEWEST_SIZES, Fit, Link
from benchmarks.harness.session import Sample, Session
from benchmarks.harness.statistics import Spread, paired_ratio, spread
from benchmarks.harness.summary import Row, by_repeat
from common.errors import UsageError

MOST_RANKS = 1024
STEPS = 400  # of one process, to time a batch size where data are made to measure
HALF = 0.5  # of the ideal speedup
MEASURED_LINKS = Path("out", "collectives", "collectives.json")
HOW_TO = "python benchmarks/collectives.py measures this machine's links, --link ALPHA_US,GBIT gives any other (--link 25,10)"
ASSUMPTIONS = (
    "every rank computes as fast as one process alone does",
    "gradients travel as one message, in a ring all-reduce, when backward is over (nothing overlaps)",
    "all ranks are joined by links of one kind, and nobody waits for a slower one",
    "averaging costs what its messages cost (not what DDP itself does), and evaluation is left out",
)
_BYTES = {"fp64": 8}  # of a gradient; else 4: with bf16 and fp16, too, weights and their gradients are float32


@dataclass(frozen=True)
class Model:
    """What a step costs at any number of ranks."""

    compute: Fit
    """c0 as its α, in seconds; c1 as 1/β, where a "byte" is a sample."""
    gradient_bytes: float
    batch: int
    """Samples a backward pass: over all ranks, or of each rank where the scaling is weak."""
    weak: bool = False
    passes: int = 1
    """Backward passes a step, each of ``batch`` samples, before one all-reduce (--accumulate)."""

    def samples(self, ranks: int) -> int:
        """Samples a backward pass of the slowest of ``ranks`` ranks."""
        return self.batch if self.weak else max(1, -(-self.batch // ranks))

    def compute_seconds(self, ranks: int) -> float:
        """What such a rank's step takes without communication."""
        return self.passes * self.compute.seconds(self.samples(ranks))

    def step_seconds(self, link: Link, ranks: int) -> float:
        """What a step takes."""
        return self.compute_seconds(ranks) + link.all_reduce_seconds(self.gradient_bytes, ranks)

    def speedup(self, link: Link, ranks: int) -> float:
        """Times one process: t(1)/t(N), or N·t(1)/t(N) where the scaling is weak."""
        return (ranks if self.weak else 1) * self.compute_seconds(1) / self.step_seconds(link, ranks)

    def most(self, link: Link) -> tuple[int, float]:
        """(ranks, speedup) where the speedup is largest, the fewest such ranks: from there this model gains nothing more."""
        return max(((n, self.speedup(link, n)) for n in range(1, MOST_RANKS + 1)), key=lambda each: (each[1], -each[0]))

    def efficient_until(self, link: Link) -> int:
        """The most ranks with at least half of the ideal speedup."""
        return max(n for n in range(1, MOST_RANKS + 1) if n == 1 or self.speedup(link, n) >= HALF * n)


@dataclass(frozen=True)
class KnownLink:
    """A link to predict for."""

    link: Link
    here: bool
    """Whether it was measured on this machine, so that what it predicts can be held against what is measured."""
    source: str

    @property
    def name(self) -> str:
        """In a legend."""
        if not self.link.ranks:
            return f"{self.link.name} (given)"
        return self.link.name if self.here else f"{self.link.name} (another machine's)"


def known_links(path: str | None, given: Sequence[Link]) -> tuple[list[KnownLink], str]:
    """The links of a collectives.json and those ``given``, and what is to be said of them ("" if nothing).

    Args:
        path: the file; None: ``MEASURED_LINKS``, if it is there and this machine's.
        given: --link.

    Raises:
        UsageError: ``path`` is no such file.
    """
    known = [KnownLink(link, False, "--link") for link in given]
    source = Path(path) if path else MEASURED_LINKS
    source = source / "collectives.json" if source.is_dir() else source
    if not path and not source.is_file():
        return known, "" if known else f"No prediction: no link is known; {HOW_TO}."
    measured = links.read(source)
    here = machine.same(_machine(source), machine.describe())
    if not here and not path:
        return known, f"{source} is another machine's, so its links are left out; {HOW_TO}."
    note = "" if here else f"{source} is another machine's: its links are drawn, and not held against what is measured here."
    return [KnownLink(link, here, str(source)) for link in measured.values()] + known, note


def _machine(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8")).get("machine")
    return found if isinstance(found, dict) else {}


def batch_sizes(batch: int, smallest: int = 1) -> list[int]:
    """The smaller batches at which one process's step is timed, beside ``batch`` itself; [] where there are too few.

    Args:
        batch: samples a step.
        smallest: where a small batch would take too long.
    """
    wanted = {max(smallest, -(-batch // part)) for part in (4, 16, 64)} - {batch}
    for other in (-(-batch // 2), *range(smallest, batch)):
        if len(wanted) >= FEWEST_SIZES - 1:
            break
        if smallest <= other < batch:
            wanted.add(other)
    return sorted(wanted, reverse=True) if len(wanted) >= FEWEST_SIZES - 1 else []


@dataclass(frozen=True)
class Step:
    """What a step of one process takes at one batch size."""

    samples: float
    """The mean over its steps: an epoch's last is smaller."""
    seconds: Spread

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        return {"samples": self.samples, "seconds": self.seconds.as_json()}


def _steps(sample: Sample) -> int:
    """Steps after the first."""
    return len((sample.result or {}).get("loss_per_step", [])) - 1


def steps_of_one(session: Session, threads: int) -> list[Step]:
    """One process's steps at each batch size that was run, the largest first."""
    one = Case("plain", 1, threads)
    by_batch: dict[int, list[tuple[float, float]]] = {}
    for sample in [*session.of("timed", one), *session.of("compute", one)]:
        seconds, rate = sample.value("step_seconds"), sample.value("samples_per_second")
        if seconds and rate and _steps(sample) > 0 and sample.result:
            batch = sample.result["global_batch_size"]
            by_batch.setdefault(batch, []).append((rate * seconds / _steps(sample), seconds / _steps(sample)))
    found = []
    for _, pairs in sorted(by_batch.items(), reverse=True):
        if seconds_a_step := spread([s for _, s in pairs]):
            found.append(Step(statistics.median(n for n, _ in pairs), seconds_a_step))
    return found


def gradient_bytes(result: dict[str, Any]) -> float:
    """What a rank sends in one step: compressed as it says, else every parameter's gradient."""
    return float(result.get("bytes_per_step") or result["parameters"] * _BYTES.get(result.get("precision", ""), 4))


def link_of(row: Row, result: dict[str, Any], known: Sequence[KnownLink]) -> KnownLink | None:
    """The link that carries the gradients of ``row``, if it was measured on this machine."""
    way = result.get("sync")
    if way == "shared_memory":
        name = way
    elif way == "mpi":
        name = f"mpi ({mpis.named(row.case.variant).name})"
    else:
        name = str(result.get("backend"))
    return next((k for k in known if k.here and k.link.name in (name, way)), None)


@dataclass(frozen=True)
class Compared:
    """One launcher at one number of ranks: what was measured, and what was predicted for its link."""

    row: Row
    measured: Spread
    """Speedup of training steps over one process with a rank's threads."""
    way: str
    known: KnownLink | None
    predicted: float | None

    @property
    def ratio(self) -> float | None:
        """Predicted / measured."""
        return self.predicted / self.measured.median if self.predicted is not None else None

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        return {
            "launcher": self.row.case.launcher,
            "world_size": self.row.case.world_size,
            "oversubscribed": self.row.oversubscribed,
            "sync": self.way,
            "link": self.known.link.name if self.known else None,
            "measured_speedup": self.measured.as_json(),
            "predicted_speedup": self.predicted,
            "predicted_over_measured": self.ratio,
        }


@dataclass(frozen=True)
class Prediction:
    """All that is predicted, and how far off it is where it can be told."""

    model: Model
    steps: list[Step]
    known: list[KnownLink]
    compared: list[Compared]

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        model, powers = self.model, [2**k for k in range(MOST_RANKS.bit_length())]
        c1 = 1 / model.compute.beta_bytes_per_s if model.compute.beta_bytes_per_s else None
        return {
            "model": {
                "formula": "t(N) = c0 + c1·b + 2(N-1)·(α + S/(N·β))",
                "assumptions": ASSUMPTIONS,
                "fixed_seconds": model.compute.alpha_s,
                "seconds_per_sample": c1,
                "compute_fit_error": {"median": model.compute.median_error, "largest": model.compute.largest_error},
                "compute_steps": [step.as_json() for step in self.steps],
                "gradient_bytes": model.gradient_bytes,
                "batch": model.batch,
                "scaling": "weak" if model.weak else "strong",
            },
            "links": [
                {
                    **k.link.as_json(),
                    "source": k.source,
                    "measured_here": k.here,
                    "gains_until_ranks": model.most(k.link)[0],
                    "largest_speedup": model.most(k.link)[1],
                    "half_efficient_until_ranks": model.efficient_until(k.link),
                    "speedup": {str(n): model.speedup(k.link, n) for n in powers},
                }
                for k in self.known
            ],
            "compared": [each.as_json() for each in self.compared],
        }


def predict(session: Session, rows: Sequence[Row], known: list[KnownLink], threads: int, weak: bool) -> Prediction | None:
    """The prediction; None if the runs that it needs are not there.

    Args:
        session: the runs: timed, and of one process with smaller batches ("compute").
        rows: what was compared.
        known: the links.
        threads: of a rank.
        weak: whether the work per rank is fixed.
    """
    one, steps = session.of("timed", Case("plain", 1, threads)), steps_of_one(session, threads)
    first = one[0].result if one else None
    if not first or not steps or (not weak and len(steps) < FEWEST_SIZES):
        return None
    if weak:
        compute = Fit(steps[0].seconds.median, float("inf"), 0.0, 0.0, 1)
    else:
        compute = links.fit([s.samples for s in steps], [s.seconds.median for s in steps])
    sent = next((r for row in rows if row.case.world_size > 1 for s in session.of("timed", row.case) if (r := s.result)), first)
    model = Model(compute, gradient_bytes(first | {"bytes_per_step": sent.get("bytes_per_step")}), first["global_batch_size"], weak)
    compared = []
    for row in rows:
        runs = session.of("timed", row.case)
        speedup = paired_ratio(by_repeat(one, "step_seconds"), by_repeat(runs, "step_seconds"))
        if row.case.world_size == 1 or row.case.launcher in PEERS or not speedup or not runs[0].result:
            continue
        factor = row.case.world_size if weak else 1
        measured = Spread(speedup.median * factor, speedup.low * factor, speedup.high * factor, speedup.samples)
        link = link_of(row, runs[0].result, known)
        predicted = model.speedup(link.link, row.case.world_size) if link else None
        compared.append(Compared(row, measured, str(runs[0].result.get("sync")), link, predicted))
    return Prediction(model, steps, known, compared)


def sentences(found: Prediction) -> list[str]:
    """Where this model stops gaining, a sentence a link."""
    told = []
    for k in found.known:
        ranks, speedup = found.model.most(k.link)
        half = found.model.efficient_until(k.link)
        if ranks == 1:
            text = "never gains, one process is fastest"
        elif ranks == MOST_RANKS:
            text = f"still gains at {MOST_RANKS:,} ranks ({speedup:,.1f} times one process)"
        else:
            text = f"stops gaining at {ranks:,} ranks ({speedup:,.2f} times one process)"
        more = f"; at least half of the ideal speedup up to {half:,} rank{'s' * (half > 1)}" if ranks > 1 else ""
        told.append(f"{k.name}: this model {text}{more}.")
    return told


def described(model: Model) -> str:
    """The model in one sentence."""
    fixed, rate = model.compute.alpha_s * 1e3, 1e6 / model.compute.beta_bytes_per_s
    step = f"{_three(fixed)} ms" if model.weak else f"{_three(fixed)} ms and {_three(rate)} µs a sample"
    batch = f"{model.batch} samples a rank" if model.weak else f"{model.batch} samples over all ranks, at least 1 each"
    return f"One process's step takes {step}; a step has {batch}; a rank sends {model.gradient_bytes:,.0f} bytes of gradients."


def _three(value: float) -> str:
    """Three digits or more, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def parse_links(texts: Sequence[str]) -> list[Link]:
    """The links of --link.

    Raises:
        UsageError: one is not allowed.
    """
    found = []
    for text in texts:
        try:
            found.append(links.parse_link(text))
        except ValueError as allowed:
            raise UsageError(f"--link {text}: not allowed; give {allowed}") from None
    return found
