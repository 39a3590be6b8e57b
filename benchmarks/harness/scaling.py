"""How launch time and memory grow with the ranks, against one rank, against torchrun, and against the floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.cases import FLOOR, Case
from benchmarks.harness.session import Sample, Session
from benchmarks.harness.statistics import Spread, paired_ratio, spread
from benchmarks.harness.summary import by_repeat

TOLD_AT = (4, 16)  # ranks for which the ratios are said in words


@dataclass(frozen=True)
class Point:
    """One launcher at one number of ranks."""

    case: Case
    launch_seconds: Spread | None
    memory_bytes: Spread | None
    """The ranks' proportional set sizes, summed; None where the system does not tell."""
    against_one_rank: Spread | None
    """Launch time / that of the same launcher with one rank."""
    against_torchrun: Spread | None
    """Launch time / torchrun's with as many ranks."""
    memory_against_spawn: Spread | None
    """Memory / that of ``spawn (spawn)`` with as many ranks."""

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        names = ("launch_seconds", "memory_bytes", "against_one_rank", "against_torchrun", "memory_against_spawn")
        figures = {name: (s := getattr(self, name)) and s.as_json() for name in names}
        return {"launcher": self.case.title, "world_size": self.case.world_size, **figures}


def _memory(samples: Sequence[Sample]) -> dict[int, float]:
    """{repeat: bytes that all ranks hold together}."""
    shares = {s.job.repeat: (s.result or {}).get("pss_bytes_per_rank") for s in samples}
    return {repeat: float(sum(share)) for repeat, share in shares.items() if share}


def points(session: Session, cases: Sequence[Case]) -> list[Point]:
    """A point a case; ratios are taken within a repeat."""

    def launch(case: Case) -> dict[int, float]:
        return by_repeat(session.of("scaling", case), "launch_seconds")

    found = []
    for case in cases:
        own, memory = launch(case), _memory(session.of("scaling", case))
        spawn = _memory(session.of("scaling", Case("spawn", case.world_size, case.threads, "spawn")))
        found.append(
            Point(
                case,
                spread(list(own.values())),
                spread(list(memory.values())),
                paired_ratio(own, launch(Case(case.launcher, 1, case.threads, case.variant))),
                paired_ratio(own, launch(Case("torchrun", case.world_size, case.threads))),
                paired_ratio(memory, spawn),
            )
        )
    return found


def floor(session: Session) -> Spread | None:
    """The launch time of one interpreter that makes one step."""
    return spread([s.value("launch_seconds") for s in session.of("scaling") if s.job.case.launcher == FLOOR])


def sentences(found: Sequence[Point]) -> list[str]:
    """A sentence a launcher and number of ranks that is told."""
    told = []
    for point in found:
        n, words = point.case.world_size, []
        if n not in TOLD_AT or not point.launch_seconds:
            continue
        if point.against_one_rank:
            words.append(f"launches in {point.against_one_rank.text()} times its time for 1 rank")
        if point.against_torchrun and point.case.launcher != "torchrun":
            words.append(f"{point.against_torchrun.text()} times torchrun's for {n}")
        if point.memory_bytes:
            mib = f"ranks hold {point.memory_bytes.median / 2**20:,.0f} MiB together (PSS)"
            ratio = point.memory_against_spawn
            own = (point.case.launcher, point.case.variant) == ("spawn", "spawn")
            words.append(mib + (f", {ratio.text()} times spawn (spawn)'s" if ratio and not own else ""))
        told.append(f"{point.case.name}: {'; '.join(words)}.")
    return told
