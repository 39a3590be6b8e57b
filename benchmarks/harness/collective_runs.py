"""The runs of collectives.py: which ways are here, how each is started, and what its ranks found."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import cases, mpis
from benchmarks.harness.cases import Case
from benchmarks.harness.cluster import MASTER_PORT, Hosts
from benchmarks.harness.runner import REPOSITORY
from benchmarks.harness.session import Job, Start
from common.errors import RunError, UsageError

WAYS = ("gloo", "mpi", "shared_memory", "nccl")
MEMORY_COPY = "memory_copy"  # no way: the ceiling
COPIES = ("own", "hand_over", "neighbour")
PROGRAM = REPOSITORY / "benchmarks" / "collective_ranks.py"


@dataclass(frozen=True)
class Plan:
    """What the ranks of one run are to measure."""

    way: str
    """Of ``WAYS``, ``MEMORY_COPY``, or module:Class."""
    world_size: int
    collectives: Sequence[str]
    sizes: Sequence[int]
    """Bytes."""
    limit_s: float
    nodes: int = 1
    """Hosts that share the ranks evenly."""
    bytes_per_s: float | None = None
    """Of a link that is known to be slow: what takes long is called less often."""

    def as_text(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Plan:
        """What ``as_text`` made.

        Raises:
            UsageError: it is something else.
        """
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            raise UsageError("PLAN is none of benchmarks/collectives.py's: run that") from None


def titles() -> list[str]:
    """All that ``--ways`` takes by name, MPIs one by one too."""
    return [*WAYS, *(Case("mpi", 1, 1, name).title for name in cases.variants("mpi"))]


def is_own(name: str) -> bool:
    """Whether a way is a class of the user's own: module:Class."""
    return ":" in name


@dataclass(frozen=True)
class Here:
    """What of the ways that were asked for can be run on this machine."""

    found: list[tuple[str, str]]
    """(way, variant) of those that can."""
    missing: dict[str, str]
    """{way with its variant: why it cannot, and what brings it}."""
    unmet: list[str]
    """What was asked for and is in none of those found."""
    gpus: int


def find(names: Sequence[str]) -> Here:
    """Looks what of ``names`` is here.

    Raises:
        UsageError: a class of the user's own cannot be had, or this Python has no torch.
    """
    told = _ask(sys.executable, [name for name in names if is_own(name)])
    found: list[tuple[str, str]] = []
    missing: dict[str, str] = {}
    unmet = []
    for name in names:
        before = len(found)
        way, _, variant = name.removesuffix(")").partition(" (")
        if way == "mpi":
            for mpi in [variant] if variant else cases.variants("mpi"):
                try:
                    mpis.named(mpi)
                    found.append((way, mpi))
                except UsageError as reason:
                    missing[Case(way, 1, 1, mpi).title] = str(reason)
        elif way == "nccl" and not told["gpus"]:
            missing[way] = "needs a CUDA device that this PyTorch can use, one for each rank"
        elif told.get(way) and is_own(way):
            raise UsageError(told[way])
        elif told.get(way):
            missing[way] = told[way]
        else:
            found.append((way, ""))
        if len(found) == before:
            unmet.append(name)
    return Here(list(dict.fromkeys(found)), missing, unmet, told["gpus"])


def _ask(python: str, own: Sequence[str]) -> dict[str, Any]:
    """What collective_ways.tell prints: asked of another process, since it imports torch."""
    code = "import sys; from benchmarks.collective_ways import tell; tell(sys.argv[1])"
    surroundings = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))}
    words = [python, "-c", code, json.dumps(own)]
    ended = subprocess.run(words, env=surroundings, capture_output=True, text=True, timeout=120, check=False)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UsageError(f"{python} cannot run this project's ranks ({last}): pip install -r requirements.txt")
    told: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return told


def start(job: Job, folder: Path) -> Start:
    """Starts the ranks of a job whose only flag is its plan; they leave their files in ``folder``."""
    words = [str(PROGRAM), *job.flags, str(folder)]
    variables: dict[str, str | None] = {"RANK": None, "OMP_NUM_THREADS": "1"}
    if job.case.launcher == "mpi":
        mpi = mpis.named(job.case.variant)
        head, more = cases.mpirun(str(job.case.world_size), mpi)
        words = [*head, mpi.python, *words]
        variables.update(more)
    else:
        words = [sys.executable, *words]
    shown = [f"'{word}'" if word in job.flags else "FOLDER" if word == str(folder) else word for word in words]
    return Start(words, variables, cases.shown(shown))


def start_on(hosts: Hosts) -> Callable[[Job, Path], Start]:
    """What starts the ranks of a job over links whose rate is its case's variant."""

    def start(job: Job, folder: Path) -> Start:
        hosts.set_rate(job.case.variant)
        plan = Plan.from_text(job.flags[0])
        where = ["NODE_RANK={rank}", "MASTER_ADDR={master}", f"MASTER_PORT={MASTER_PORT}", "OMP_NUM_THREADS=1"]
        words = ["env", *where, sys.executable, str(PROGRAM)]
        typed = hosts.typed(plan.nodes, [*words, f"'{job.flags[0]}'", "FOLDER"])
        return Start(hosts.words(plan.nodes, [*words, job.flags[0], str(folder)]), {"RANK": None}, typed)

    return start


def read(job: Job, folder: Path, started: float) -> dict[str, Any]:
    """What the ranks measured: for each collective and size the slowest rank's microseconds of each call.

    Raises:
        RunError: a rank left nothing, or measured something else than the others.
    """
    plan = Plan.from_text(job.flags[0])
    told = []
    for rank in range(plan.world_size):
        try:
            told.append(json.loads((folder / f"rank-{rank}.json").read_text()))
        except FileNotFoundError:
            raise RunError(f"left no figures of rank {rank}") from None
    asked = [(kind, size) for kind in plan.collectives for size in plan.sizes]
    if {len(t["measured"]) for t in told} != {len(asked)}:
        raise RunError("has ranks that did not measure all that was asked for")
    measured = []
    for (kind, size), *each in zip(asked, *(t["measured"] for t in told), strict=True):
        same = len({(e["bytes"], len(e["seconds"])) for e in each}) == 1
        if not same or {(e["collective"], e["size"]) for e in each} != {(kind, size)}:
            raise RunError(f"has ranks that measured different things where {kind} of {size} bytes was asked for")
        slowest = [round(1e6 * max(calls), 2) for calls in zip(*(e["seconds"] for e in each), strict=True)]
        measured.append({"collective": kind, "size": size, "bytes": each[0]["bytes"], "microseconds": slowest})
    return {"device": told[0]["device"], "measured": measured}
