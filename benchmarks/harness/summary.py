"""From raw samples to figures: per launcher and world size, against both single-process baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.harness.cases import PEERS, Case
from benchmarks.harness.lossy import LOSSLESS, Lost, lost
from benchmarks.harness.parity import Parity, judge
from benchmarks.harness.session import Sample, Session
from benchmarks.harness.statistics import Spread, paired_ratio, spread

FIGURES = (
    "wall_seconds",
    "launch_seconds",
    "train_seconds",
    "leave_seconds",
    "samples_per_second",
    "peak_memory_bytes",
    "train_loss_per_epoch",
    "eval_loss_per_epoch",
    "eval_accuracy",
)


@dataclass
class Row:
    """All about one launcher at one world size."""

    case: Case
    oversubscribed: bool
    """More ranks × threads than cores."""
    figures: dict[str, Spread | None]
    speedup: dict[str, Spread | None]
    """Of training and command time, against one process with one rank's threads, and with all threads."""
    efficiency: Spread | None
    """Of training, against one process with one rank's threads: speedup / ranks."""
    parity: Parity | None
    parameters: str | None
    """SHA-256 of the trained parameters, if all repeats agree."""
    start_method: str | None = None
    """multiprocessing's, where the launcher has one."""
    sync: str | None = None
    """How its ranks averaged gradients."""
    lost: Lost | None = None
    """What a lossy run lost."""

    @property
    def name(self) -> str:
        """The launcher's, with its start method."""
        return f"{self.case.launcher} ({self.start_method})" if self.start_method else self.case.launcher

    def as_json(self) -> dict[str, Any]:
        """For a result file."""

        def plain(values: dict[str, Spread | None]) -> dict[str, Any]:
            return {name: value and value.as_json() for name, value in values.items()}

        return {
            "launcher": self.case.launcher,
            "start_method": self.start_method,
            "world_size": self.case.world_size,
            "threads": self.case.threads,
            "oversubscribed": self.oversubscribed,
            "figures": plain(self.figures),
            "speedup": plain(self.speedup),
            "efficiency": self.efficiency and self.efficiency.as_json(),
            "sync": self.sync,
            "lost": self.lost and self.lost.as_json(),
            "parity": self.parity and self.parity.as_json(),
            "parameter_sha256": self.parameters,
        }


def by_repeat(samples: list[Sample], name: str) -> dict[int, float]:
    """{repeat: figure}."""
    return {s.job.repeat: value for s in samples if (value := s.value(name)) is not None}


def first_result(samples: list[Sample]) -> dict[str, Any] | None:
    """The result of the first good run."""
    return samples[0].result if samples else None


def summarise(session: Session, cases: list[Case], threads: int, cores: int, weak: bool) -> list[Row]:
    """One row a case.

    With weak scaling each rank's work is fixed, so the time is to stay what it was: the speedup is N · t(1) / t(N).
    """
    one = session.of("timed", Case("plain", 1, threads))
    # Where one rank's threads are all threads, the two baselines are one.
    all_threads = session.of("baseline") or (one if threads >= cores else [])
    rows = []
    for case in cases:
        timed = session.of("timed", case)
        factor = case.world_size if weak else 1
        speedup = {}
        for what in ("train_seconds", "wall_seconds"):
            for label, base in (("one_rank", one), ("all_threads", all_threads)):
                ratio = paired_ratio(by_repeat(base, what), by_repeat(timed, what))
                speedup[f"{what}/{label}"] = ratio and _scaled(ratio, factor)
        training = speedup["train_seconds/one_rank"]
        reference = [s for s in session.of("reference") if s.job.case == case or s.job.label.endswith(f" {case.world_size}")]
        fp64_reference = [
            s for s in session.of("fp64 reference") if not weak or s.job.label.endswith(f" {case.world_size}")
        ]  # strong scaling: one reference for all
        lossless = [s for s in session.of(LOSSLESS) if not weak or s.job.label.endswith(f" {case.world_size}")]
        first, whole = first_result(timed), first_result(lossless)
        digests = {s.result.get("parameter_sha256") for s in timed if s.result}
        rows.append(
            Row(
                case,
                case.world_size * case.threads > cores,
                {name: spread([s.value(name) for s in timed]) for name in FIGURES},
                speedup,
                training and _scaled(training, 1 / case.world_size),
                judge(
                    first_result(session.of("fp64", case)),
                    first_result(fp64_reference),
                    first,
                    whole or first_result(reference if weak else one),
                )
                if timed or session.of("fp64", case)
                else None,
                digests.pop() if len(digests) == 1 else None,
                (first or {}).get("start_method"),
                (first or {}).get("sync"),
                lost(first, whole) if case.launcher not in PEERS else None,
            )
        )
    return rows


def _scaled(value: Spread, factor: float) -> Spread:
    return Spread(value.median * factor, value.low * factor, value.high * factor, value.samples)


def same_to_the_bit(rows: list[Row]) -> dict[int, bool]:
    """{world size: whether all launchers that were compared there ended with the same parameters}; where there are two or more.

    Ranks that average in another way (--sync auto) may add in another order, so only those of one way are held against each other.
    """
    found: dict[int, bool] = {}
    for world_size in sorted({row.case.world_size for row in rows}):
        there = [r for r in rows if r.case.world_size == world_size and r.name not in PEERS and r.figures["train_seconds"]]
        for way in dict.fromkeys(r.sync for r in there):
            same = [r for r in there if r.sync == way]
            if len(same) > 1:
                agree = len({r.parameters for r in same}) == 1 and same[0].parameters is not None
                found[world_size] = found.get(world_size, True) and agree
    return found


def noisy(rows: list[Row]) -> list[str]:
    """The cases whose repeats differ too much to tell small differences."""
    return [r.case.name for r in rows if any((f := r.figures[n]) and f.noisy for n in ("train_seconds", "wall_seconds"))]
