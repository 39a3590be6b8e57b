"""compare.py --batch_sizes: samples/s, and the time to an accuracy, by batch size."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.session import Session
from benchmarks.harness.statistics import Spread, spread


def points(session: Session, target: float) -> list[dict[str, Any]]:
    """One point a case and batch size: samples/s and training time until the accuracy was reached (None if in no repeat)."""
    found = []
    for job in dict.fromkeys((s.job.case, s.job.label) for s in session.of("batch")):
        mine = [s for s in session.of("batch") if (s.job.case, s.job.label) == job]
        reached: list[float | None] = []
        for sample in mine:
            assert sample.result
            ends, accuracy = sample.result["epoch_end_seconds"], sample.result["eval_accuracy"]
            reached.append(next((t for t, a in zip(ends, accuracy, strict=True) if a is not None and a >= target), None))
        found.append(
            {
                "name": job[0].name,
                "launcher": job[0].launcher,
                "world_size": job[0].world_size,
                "batch_size": int(job[1].split()[-1]),
                "learning_rate": mine[0].result and mine[0].result["learning_rate"],
                "samples_per_second": spread([s.value("samples_per_second") for s in mine]),
                "seconds_to_target": spread(reached),
                "has_accuracy": mine[0].value("eval_accuracy") is not None,
            }
        )
    return found


def as_json(point: dict[str, Any]) -> dict[str, Any]:
    """A point with its spreads spelled out."""
    return {name: value.as_json() if isinstance(value, Spread) else value for name, value in point.items()}
