"""What each launcher leaves its ranks with: threads, cores, variables; and how much of its speed that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.cases import Case
from benchmarks.harness.session import Session
from benchmarks.harness.statistics import Spread, paired_ratio, spread
from benchmarks.harness.summary import by_repeat, first_result
from common.values import AS_SHIPPED


@dataclass(frozen=True)
class Gift:
    """What the ranks of one launcher found (``--inspect``)."""

    case: Case
    ranks: list[dict[str, Any]]

    def each(self, name: str) -> str:
        """A figure of all ranks: one value if it is the same for all, else theirs in rank order."""
        values = ["–" if rank[name] is None else str(rank[name]) for rank in self.ranks]
        return values[0] if len(set(values)) == 1 else ", ".join(values)

    @property
    def cores(self) -> str:
        """The cores that each rank may use: "0-1", or "0 | 1" where ranks have their own."""
        from common.inspection import compact  # here, when all is measured: it imports torch

        return " | ".join(dict.fromkeys(compact(rank["cores"]) for rank in self.ranks))

    @property
    def variables(self) -> dict[str, str] | None:
        """What the launcher set, with rank 0's values; None where the system does not tell."""
        found: dict[str, str] | None = self.ranks[0]["variables"]
        return found

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        return {"launcher": self.case.title, "world_size": self.case.world_size, "ranks": self.ranks}


def gifts(session: Session) -> list[Gift]:
    """A gift a launcher that was inspected."""
    return [Gift(s.job.case, s.result["ranks"]) for s in session.of("inspection") if s.result]


@dataclass(frozen=True)
class Speed:
    """One launcher's training, with equal threads and as shipped, against plain's."""

    fair: Case
    threads_as_shipped: int | None
    fair_seconds: Spread | None
    shipped_seconds: Spread | None
    apparent: Spread | None
    """How many times as fast as plain, each as shipped."""
    real: Spread | None
    """How many times as fast as plain, with equal threads and no binding."""
    threads: Spread | None
    """apparent / real: what is due to threads and cores."""

    def sentence(self) -> str:
        """How much of the difference was threads."""
        if not (self.apparent and self.real and self.threads):
            return f"{self.fair.title}: not measured both ways."
        left = f"{self.threads_as_shipped} thread{'s' * (self.threads_as_shipped != 1)} a rank"
        text = (
            f"{self.fair.title}: as shipped ({left}) its training is {_times(self.apparent)} as fast as plain's, "
            f"with equal threads {_times(self.real)}. "
        )
        if self.threads.samples > 1 and self.threads.low <= 1 <= self.threads.high:
            return text + f"What threads did ({_times(self.threads)}) is less than the runs differ among themselves."
        return text + f"Threads and cores made a factor of {self.threads.text()}."

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        spreads = ("fair_seconds", "shipped_seconds", "apparent", "real", "threads")
        figures = {name: (s := getattr(self, name)) and s.as_json() for name in spreads}
        return {
            "launcher": self.fair.title,
            "threads_fair": self.fair.threads,
            "threads_as_shipped": self.threads_as_shipped,
            **figures,
        }


def _times(ratio: Spread) -> str:
    return f"{ratio.text()} times"


def as_shipped(case: Case) -> Case:
    """``case`` with the threads and cores that its launcher leaves."""
    return Case(case.launcher, case.world_size, AS_SHIPPED, case.variant)


def speeds(session: Session, cases: Sequence[Case]) -> list[Speed]:
    """One a launcher of the fair ``cases``, of which one is plain."""

    def training(case: Case) -> dict[int, float]:
        return by_repeat(session.of("timed", case), "train_seconds")

    plain = next(case for case in cases if case.launcher == "plain")
    found = []
    for case in cases:
        fair, shipped = training(case), training(as_shipped(case))
        apparent, real = _ratios(training(as_shipped(plain)), shipped), _ratios(training(plain), fair)
        result = first_result(session.of("timed", as_shipped(case))) or {}
        found.append(
            Speed(
                case,
                result.get("threads_per_rank"),
                spread(list(fair.values())),
                spread(list(shipped.values())),
                spread(list(apparent.values())),
                spread(list(real.values())),
                paired_ratio(apparent, real),
            )
        )
    return found


def _ratios(above: dict[int, float], below: dict[int, float]) -> dict[int, float]:
    """{repeat: above / below} where both are there."""
    return {r: above[r] / below[r] for r in above.keys() & below.keys() if below[r] > 0}
