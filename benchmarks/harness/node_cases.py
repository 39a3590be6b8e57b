"""What compare.py --nodes runs: one job on so many hosts, at a link's rate, with one way of sending less."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import cases, collective_runs
from benchmarks.harness.cases import Case, script_of
from benchmarks.harness.cluster import MASTER_PORT, UNLIMITED, Hosts, bytes_per_s, rate_text
from benchmarks.harness.collective_runs import Plan
from benchmarks.harness.command_line import without
from benchmarks.harness.mpis import program
from benchmarks.harness.session import Job, Start, read_launcher
from common.config import COMPRESSIONS
from common.errors import RunError
from common.values import whole

LAUNCHERS = ("spawn", "torchrun", "elastic")
PLAIN, ACCUMULATE, PARTS = "ddp", "accumulate", 4
LINK, LINK_WAY = "link", "gloo"
LINK_SIZES = (2**12, 2**16, 2**18, 2**20, 2**22)  # bytes


@dataclass(frozen=True)
class NodeWay:
    """A way of sending gradients, by the flag that asks for it."""

    compress: str = ""
    """Of ``COMPRESSIONS``; empty: as they are."""
    passes: int = 1
    """Backward passes a step, with one all-reduce."""

    @property
    def title(self) -> str:
        """As one types it; without a flag ``ddp``."""
        return f"--compress {self.compress}" if self.compress else f"--accumulate {self.passes}" if self.passes > 1 else PLAIN

    def flags(self, flags: list[str], batch: int, ranks: int) -> list[str]:
        """``flags`` with this way's.

        Args:
            flags: those of plain ddp.
            batch: samples a step of plain ddp; with ``passes`` a step has so many times as many.
            ranks: one has nothing to compress.
        """
        if self.passes > 1:
            return [*without(flags, "--global_batch_size"), "--global_batch_size", str(self.passes * batch), "--accumulate",
                    str(self.passes)]  # fmt: skip
        return [*flags, "--compress", self.compress] if self.compress and ranks > 1 else flags


def parse_way(text: str) -> NodeWay:
    """``ddp``, ``fp16``, …, ``accumulate`` or ``accumulate:K``.

    Raises:
        ValueError: its text says what is allowed.
    """
    name, colon, number = text.partition(":")
    try:
        if name == ACCUMULATE:
            return NodeWay(passes=whole(2)(number) if colon else PARTS)
        if text in COMPRESSIONS:
            return NodeWay(compress=text)
        if text == PLAIN:
            return NodeWay()
    except ValueError:
        pass
    raise ValueError(f"some of {PLAIN}, {', '.join(COMPRESSIONS)}, {ACCUMULATE} ({PARTS} parts), {ACCUMULATE}:K (K of 2 or more)")


@dataclass(frozen=True)
class NodeCase(Case):
    """A launcher, its hosts and ranks, the links' rate, and how gradients are sent."""

    nodes: int = 1
    rate: str = UNLIMITED
    way: NodeWay = NodeWay()

    @property
    def name(self) -> str:
        """In a table or a message."""
        link = f", {rate_text(self.rate)}" if self.nodes > 1 else ""
        launcher = f"{self.title}, " if self.launcher not in (LAUNCHERS[0], "plain") else ""
        return f"{launcher}{self.nodes} node{'s' * (self.nodes > 1)}{link}, {self.way.title}"


def command(case: NodeCase, flags: list[str]) -> list[str]:
    """The command line of each host, with {rank} and {master} to be filled in.

    Raises:
        UsageError: the launcher is not here.
    """
    per_node = str(case.world_size // case.nodes)
    threads = ["--threads", str(case.threads)]
    where = ["--nnodes", str(case.nodes), "--nproc_per_node", per_node, "--node_rank", "{rank}", "--master_addr", "{master}"]
    if case.launcher == "torchrun":
        words = [program("torchrun"), *where, "--master_port", str(MASTER_PORT), script_of("launchers", "torchrun")]
        return ["env", f"OMP_NUM_THREADS={case.threads}", *words, *flags, *threads]  # only spares torchrun's notice
    if case.launcher == "elastic":  # its agents number the nodes
        where = ["--nnodes", str(case.nodes), "--nproc_per_node", per_node, "--master_addr", "{master}", "--max_restarts", "0"]
    return [sys.executable, script_of("launchers", case.launcher), *where, *flags, *threads]


def start_on(hosts: Hosts) -> Callable[[Job, Path], Start]:
    """What starts a job on ``hosts``: of several ranks, of one, or an all-reduce over a link."""

    def start(job: Job, folder: Path) -> Start:
        if job.role == LINK:
            return collective_runs.start_on(hosts)(job, folder)
        result = ["--result", str(folder / "result.json")]
        if isinstance(job.case, NodeCase) and job.case.world_size > 1:
            hosts.set_rate(job.case.rate)
            nodes, words = job.case.nodes, command(job.case, list(job.flags))
        else:
            nodes, (words, _) = 1, cases.command(Case("plain", 1, job.case.threads), list(job.flags))
        return Start(hosts.words(nodes, [*words, *result]), {}, hosts.typed(nodes, words))

    return start


def read(job: Job, folder: Path, started: float) -> dict[str, Any]:
    """What a run gave, with ``samples_per_second_later`` and ``step_seconds_later`` of the epochs after the first.

    In the first, DDP finds its buckets and PowerSGD sends everything. A single epoch is taken as it is, less its first step.

    Raises:
        RunError: it left nothing, or there was nothing to time.
    """
    if job.role == LINK:
        return collective_runs.read(job, folder, started)
    result = read_launcher(job, folder, started)
    return result | later_epochs(result)


def later_epochs(result: dict[str, Any]) -> dict[str, float]:
    """Samples per second, and seconds a step, of a run's epochs after the first.

    Raises:
        RunError: it made one step in all.
    """
    epochs, seconds, rate = result["epochs"], result["step_seconds"], result["samples_per_second"]
    if not seconds or not rate:
        raise RunError("made one step, which belongs to the start: give more data, or --epochs")
    steps, samples = len(result["loss_per_step"]) - 1, rate * seconds
    if epochs > 1:
        seconds = sum(result["step_seconds_per_epoch"][1:])
        samples = (samples + result["global_batch_size"]) * (epochs - 1) / epochs
        steps = (steps + 1) * (epochs - 1) // epochs
    return {"samples_per_second_later": samples / seconds, "step_seconds_later": seconds / steps}


def link_job(rate: str, nodes: int, ranks: int, repeat: int, label: str, limit_s: float) -> Job:
    """The all-reduce of ``ranks`` ranks on ``nodes`` hosts over links of ``rate``, in the sizes of ``LINK_SIZES``."""
    plan = Plan(LINK_WAY, ranks, ("all_reduce",), LINK_SIZES, limit_s, nodes, bytes_per_s(rate))
    return Job(Case(LINK_WAY, ranks, 1, rate), LINK, (plan.as_text(),), repeat, f"all-reduce, {label}")


def as_json(case: Case) -> dict[str, Any]:
    """What a result file says of ``case`` besides what every benchmark's does."""
    if not isinstance(case, NodeCase):
        return {"nodes": None, "rate": case.variant or None, "way": None}
    return {"nodes": case.nodes, "rate": case.rate if case.nodes > 1 else None, "way": case.way.title}
