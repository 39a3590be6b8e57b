"""Whether N ranks compute what one process computes.

In float64 the whole loss curve must agree within 1e-9 relative. In float32 the first 20 steps must, within 1e-5; after that
rounding grows by itself, in correct code too. Where equal loss is not promised (half precision, compressed gradients, padded or
uneven shares), the differences are measured all the same: how much is lost is a number, not a verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FP64_LIMIT = 1e-9
FP32_LIMIT = 1e-5
FP32_STEPS = 20
LOSSY = ("bf16", "fp16")  # of --precision


def relative_differences(curve: Sequence[float | None], reference: Sequence[float | None]) -> list[float]:
    """|curve - reference| / |reference|, step by step, over the steps that both have.

    None stands for a loss that is no finite number: equal to another such loss, infinitely far from any other.
    """
    return [
        float("inf" if a is not b else 0) if a is None or b is None else abs(a - b) / max(abs(b), 1e-300)
        for a, b in zip(curve, reference, strict=False)
    ]


@dataclass(frozen=True)
class Parity:
    """The verdict on one launcher at one world size."""

    fp64: float | None
    """Largest relative difference of the whole float64 curve; None if there is no such run."""
    fp32: float | None
    """Largest relative difference of the first 20 steps of the timed runs: float32, or what ``--precision`` said; not of fp64."""
    promised: bool
    """Whether equal loss can be expected at all."""
    reason: str = ""
    """Why not, if not."""

    @property
    def holds(self) -> bool | None:
        """True or False; None if it is not promised, or there is nothing to judge by."""
        if not self.promised or self.fp64 is None:
            return None
        return self.fp64 <= FP64_LIMIT and (self.fp32 is None or self.fp32 <= FP32_LIMIT)

    def verdict(self) -> str:
        """In words."""
        if not self.promised:
            return f"not promised: {self.reason}"
        return {True: "same", False: "BROKEN", None: "not judged"}[self.holds]

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        return {"fp64_difference": self.fp64, "fp32_difference": self.fp32, "holds": self.holds, "verdict": self.verdict()}


def not_promised(result: dict[str, Any]) -> str:
    """Why the run of this result file is not bound to compute what one process computes; empty if it is."""
    if layers := result.get("batch_dependent_layers"):
        return f"{', '.join(layers)} depends on the batch or on chance"
    if result.get("sampler") == "distributed":
        return "DistributedSampler pads"
    if result.get("sampler") == "uneven":
        return "uneven ranks make other batches than one process"
    if (compress := result.get("compress")) and result.get("world_size") != 1:  # one rank sends nothing
        return f"--compress {compress} loses some of each gradient"
    if (precision := result.get("precision")) in LOSSY:
        return f"{precision} rounds"
    return ""


def judge(
    fp64: dict[str, Any] | None,
    fp64_reference: dict[str, Any] | None,
    fp32: dict[str, Any] | None,
    fp32_reference: dict[str, Any] | None,
) -> Parity:
    """Compares result files of a launcher's ranks with those of one process (the reference)."""
    reason = not_promised(fp64 or {}) or not_promised(fp32 or {})

    def difference(a: dict[str, Any] | None, b: dict[str, Any] | None, steps: int | None) -> float | None:
        if a is None or b is None or not a["loss_per_step"]:  # another loop, which keeps none
            return None
        if len(a["loss_per_step"]) != len(b["loss_per_step"]) and steps is None:
            return None if reason else float("inf")
        return max(relative_differences(a["loss_per_step"][:steps], b["loss_per_step"][:steps]), default=float("inf"))

    in_fp32 = None if (fp32 or {}).get("precision") == "fp64" else difference(fp32, fp32_reference, FP32_STEPS)
    return Parity(difference(fp64, fp64_reference, None), in_fp32, not reason, reason)
