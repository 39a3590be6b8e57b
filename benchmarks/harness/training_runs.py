"""Whole trainings: which settings of the launchers and which other tools are run, and whether each did the same work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.cases import Case
from benchmarks.harness.peer_runs import GLOBAL_BATCH, LAUNCHERS, PeerRuns, read_ranks
from benchmarks.harness.session import Job, Start, read_launcher, start_launcher
from common.config import DIGITS_TRAIN_SIZE
from common.errors import RunError

TUTORIAL = "tutorial"
TOOLS = {
    "trainer": "Hugging Face Trainer",
    "accelerate": "accelerate",
    "fabric": "Lightning Fabric",
    TUTORIAL: "PyTorch's DDP tutorial loop",
}
"""The other tools, and what they are called; all train in float32."""
PRECISIONS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "fp32_channels_last": ("--channels_last",),
    "bf16": ("--precision", "bf16", "--channels_last"),
}
"""What a launcher is told for each."""
DEFAULT_SYNC = "ddp"
FASTEST_SYNC = {"mpi": "mpi"}  # else shared_memory


@dataclass(frozen=True)
class Setting(Case):
    """A launcher with training flags, or another tool."""

    sync: tuple[str, ...] = ()
    """A launcher's flags for averaging gradients."""
    precision: str = "fp32"
    """Of ``PRECISIONS``."""

    @property
    def flags(self) -> tuple[str, ...]:
        """All training flags of a launcher."""
        return self.sync + PRECISIONS[self.precision]

    @property
    def is_ours(self) -> bool:
        """Whether it is a launcher of this project."""
        return self.launcher in LAUNCHERS

    @property
    def title(self) -> str:
        """``spawn.py --sync shared_memory, bf16``, or the tool's name."""
        if not self.is_ours:
            return TOOLS[self.launcher]
        sync = " ".join([f"{self.launcher}.py", *self.sync])
        return sync if self.precision == "fp32" else f"{sync}, {self.precision}"


def settings(
    launchers: Sequence[str], tools: Sequence[str], world_size: int, threads: int, precisions: Sequence[str]
) -> list[Setting]:
    """What is compared: every launcher with DDP and with its fastest way in float32, with that way in the others; every tool."""
    found = []
    for launcher in launchers:
        fastest = FASTEST_SYNC.get(launcher, "shared_memory")
        for precision in precisions:
            for sync in (DEFAULT_SYNC, fastest) if precision == "fp32" else (fastest,):
                flags = () if sync == DEFAULT_SYNC else ("--sync", sync)
                found.append(Setting(launcher, world_size, threads, sync=flags, precision=precision))
    return found + [Setting(tool, world_size, threads) for tool in tools]


class TrainingRuns(PeerRuns):
    """Starts them and reads what they left; for a Session's ``start`` and ``read``."""

    def start(self, job: Job, folder: Path) -> Start:
        """How to start ``job``, with its files in ``folder``."""
        return start_launcher(job, folder) if job.case.launcher in (*LAUNCHERS, TUTORIAL) else super().start(job, folder)

    def read(self, job: Job, folder: Path, started: float) -> dict[str, Any]:
        """What a run gave.

        Args:
            job: the run.
            folder: where it left its files.
            started: when the command was started, on ``common.now``'s clock.

        Returns:
            case, launch_seconds, train_seconds (first step to the last epoch's evaluation), samples_per_second (trained after the
            first step, by train_seconds), test_accuracy, world_size, threads_per_rank, backend, waited_seconds (within the command,
            but not the tool's: fitting.py), and more of the tool's own.

        Raises:
            RunError: another world size, number of threads, batch or amount of samples than asked for, or ranks whose parameters
                differ at the end.
        """
        with_result = job.case.launcher in (*LAUNCHERS, TUTORIAL)
        found = of_result(read_launcher(job, folder, started)) if with_result else of_ranks(read_ranks(folder, job.case), started)
        for name, asked in (("world_size", job.case.world_size), ("threads_per_rank", job.case.threads)):
            if found[name] != asked:
                raise RunError(f"ran with {name.replace('_', ' ')} {found[name]}, not {asked}")
        epochs = int(job.flags[job.flags.index("--epochs") + 1])
        least = epochs * DIGITS_TRAIN_SIZE - GLOBAL_BATCH
        if not least <= (trained := found["samples_after_first_step"]) <= least + epochs * GLOBAL_BATCH:  # padding at most
            raise RunError(f"trained {trained} samples after the first step, where {epochs} epochs have {least}")
        rate = trained / found["train_seconds"] if found["train_seconds"] > 0 else None
        return {"case": job.case.title} | found | {"samples_per_second": rate}


def of_result(result: dict[str, Any]) -> dict[str, Any]:
    """The figures of a launcher's result file.

    Raises:
        RunError: it has no accuracy, or a single step.
    """
    if not result["eval_accuracy"] or result["eval_accuracy"][-1] is None:
        raise RunError("told no test accuracy")
    if not result["samples_per_second"]:
        raise RunError("made no step after the first")
    samples = round(result["samples_per_second"] * result["step_seconds"])  # without the first step's, as the ranks counted them
    kept = ("launch_seconds", "train_seconds", "step_seconds", "eval_seconds", "world_size", "threads_per_rank", "backend", "sync",
            "precision", "phases", "parameter_sha256", "peak_memory_bytes")  # fmt: skip
    last = {"waited_seconds": 0.0, "test_accuracy": result["eval_accuracy"][-1], "samples_after_first_step": samples}
    return {name: result[name] for name in kept if name in result} | last


def of_ranks(ranks: list[dict[str, Any]], started: float) -> dict[str, Any]:
    """The figures of a peer script's ranks: of the slowest.

    Raises:
        RunError: their gradients did not become one, or they tell of different accuracies.
    """
    if len({r["parameter_sha256"] for r in ranks}) != 1:
        raise RunError("ended with different parameters on its ranks: their gradients were not averaged")
    if len({r["test_accuracy"] for r in ranks}) != 1:
        raise RunError(f"has test accuracies {[r['test_accuracy'] for r in ranks]} on its ranks: each looked at its own part only")
    first, done = max(r["first_step_done"] for r in ranks), max(r["training_done"] for r in ranks)
    return {
        "launch_seconds": first - started,
        "train_seconds": done - first,
        "waited_seconds": max(r["waited_seconds"] for r in ranks),
        "test_accuracy": ranks[0]["test_accuracy"],
        "samples_after_first_step": sum(r["samples"] - r["samples_first_step"] for r in ranks),
        "world_size": len(ranks),
        "threads_per_rank": ranks[0]["threads"],
        "backend": ranks[0]["backend"],
        "parameter_sha256": ranks[0]["parameter_sha256"],
        "precision": "fp32",
        "ranks": ranks,
    }
