"""When things happened: the phases of a run, a JSON line each, a file a rank; which processes launched this one.

A file (``--events DIR``, ``rank-0.jsonl``) holds a line about the rank, then a line a phase, as it ends; all times are seconds of
this host's clock (``common.now``). Ranks on other hosts measure how far their clock is from rank 0's (``process_group``).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import now
from common.errors import UsageError

if TYPE_CHECKING:
    from common.rank import Rank

PHASES = (
    "command_started",  # the launcher's command
    "interpreter_up",  # this rank's; what comes before is the launcher's
    "torch_imported",
    "ranks_known",  # the launcher's own set-up is done: this process knows who it is
    "group_joined",
    "model_built",  # and DDP, and the optimizer
    "first_step_done",
    "training_done",
    "group_left",
    "process_ended",
)
STARTED = "LAUNCHLAB_STARTED"  # set by a benchmark: CLOCK:SECONDS, when it started the command

LAUNCHERS = {
    "torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate",
    "mpirun", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy", "prterun", "prted", "prte", "orterun", "orted",
    "srun", "slurmstepd",
    "quiet_torchrun.py", "remote_guard.py",
}  # fmt: skip


def clock_id() -> str:
    """Names the clock that ``now`` reads: the machine's boot and the time namespace (time_namespaces(7)); the host elsewhere."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8] + os.readlink("/proc/self/ns/time")[5:]
    except OSError:
        return os.uname().nodename if hasattr(os, "uname") else "here"


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the command's name; [0] is the state, [1] the parent."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def started_at(pid: int) -> float:
    """When a process started, on ``now``'s clock (10 ms resolution; proc(5), field 22). OSError where there is no /proc."""
    return int(_stat(pid)[19]) / os.sysconf("SC_CLK_TCK")


def what_launches(argv: Sequence[str], folder: str = "") -> str:
    """The program of a command line, typed in ``folder``, that starts ranks; "" if it starts none.

    A launcher's program, or Python running one (its name), a file of launchers/ (``spawn.py``), or ``multiprocessing``.
    """
    if not argv:
        return ""
    program = Path(argv[0]).name.partition(":")[0]  # slurmstepd calls itself "slurmstepd: [7.0]"
    if program in LAUNCHERS:
        return program
    if not program.startswith("python"):
        return ""
    words = iter(argv[1:])
    for word in words:
        if not word.startswith("-"):
            path = Path(folder, word)
            ours = path.suffix == ".py" and path.parent.name == "launchers"
            return path.name if path.name in LAUNCHERS or ours else ""
        if word[1:2] in ("X", "W"):  # python's own options; these two take a value
            if len(word) == 2:
                next(words, "")
        elif not word.startswith("--") and (found := min((i for i in (word.find("m"), word.find("c")) if i > 0), default=0)):
            value = word[found + 1 :] or next(words, "")
            if word[found] == "m" and value.startswith("launchers."):
                return f"{value.partition('.')[2]}.py"
            if word[found] == "m":
                return value if value in LAUNCHERS or value.startswith("accelerate.commands.") else ""
            return "multiprocessing" if value.startswith("from multiprocessing.") else ""
    return ""


def is_launching(argv: Sequence[str], folder: str = "") -> bool:
    """Whether a command line, typed in ``folder``, starts ranks: see ``what_launches``."""
    return bool(what_launches(argv, folder))


def parent_of(pid: int) -> int:
    """A process's parent; 0 where there is none, or no /proc."""
    try:
        return int(_stat(pid)[1])
    except (OSError, ValueError, IndexError):
        return 0


def command_line_of(pid: int) -> tuple[list[str], str]:
    """(what a process was started as, the folder that it is in); empty where the system does not tell."""
    argv, folder = [], ""
    with contextlib.suppress(OSError):
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        folder = os.readlink(f"/proc/{pid}/cwd")  # another user's process does not tell
    return argv, folder


def launching_ancestors(pid: int | None = None) -> list[int]:
    """The chain of processes that started this one in order to launch it, nearest first; empty where there is no /proc."""
    chain: list[int] = []
    parent = parent_of(pid or os.getpid())
    while parent > 0 and is_launching(*command_line_of(parent)):  # in a container the launcher may be process 1
        chain.append(parent)
        parent = parent_of(parent)
    return chain


def command_started(launchers: Sequence[int]) -> float | None:
    """When the launcher's command started: as a benchmark told, else the start of the last of ``launchers``, or of this process.

    None where the system does not tell (no /proc): better no launch time than one that leaves out the launcher.
    """
    clock, _, seconds = os.environ.get(STARTED, "").rpartition(":")
    if clock == clock_id() and re.fullmatch(r"\d+(\.\d+)?", seconds) and float(seconds) < now():
        return float(seconds)
    try:
        return started_at([os.getpid(), *launchers][-1])
    except OSError:
        return None


class Phases:
    """Marks of one rank: when each phase ended."""

    def __init__(self, started: float | None) -> None:
        """Counts from ``started`` (``now``'s clock); where that is unknown, from here."""
        self.origin = now() if started is None else started
        self.known = started is not None
        self.marks: dict[str, float] = {}
        """Seconds since ``origin``, in the order in which they were made."""
        self.path: Path | None = None
        self._file = -1

    def mark(self, name: str, at: float | None = None) -> float:
        """Notes that ``name`` has ended, now or ``at``; returns the seconds since the command's start."""
        at = now() if at is None else at
        self.marks[name] = at - self.origin
        self.write(phase=name, time=at)
        return self.marks[name]

    def now(self) -> float:
        """Seconds since the command's start."""
        return now() - self.origin

    def joined(self, offset: float, round_trip: float, origin: float | None, threads: int) -> None:
        """Marks ``group_joined`` and counts from rank 0's command on from here.

        Args:
            offset: seconds to add to this rank's clock to get rank 0's.
            round_trip: seconds; twice the offset's largest error.
            origin: when rank 0's command started, on its clock; None: unknown.
            threads: that this rank computes with from now on.
        """
        self.mark("group_joined")
        if origin is not None:
            self.marks = {name: mark + self.origin + offset - origin for name, mark in self.marks.items()}
            self.origin = origin - offset
        self.write(clock_offset_seconds=offset, round_trip_seconds=round_trip, threads=threads)

    def write_to(self, folder: str, rank: Rank, **about: Any) -> None:
        """From here on every mark is a line of ``folder``/rank-R.jsonl (rank-R.restart-K.jsonl after the K-th restart).

        Args:
            folder: made if it is not there.
            rank: this process.
            about: more for the first line.

        Raises:
            UsageError: it cannot be written.
        """
        self.path = Path(folder).absolute() / f"rank-{rank.rank}{f'.restart-{rank.restart}' if rank.restart else ''}.jsonl"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        except OSError as error:
            raise UsageError(f"--events {folder}: cannot be written ({error.strerror}); name another folder") from None
        fields = ("launcher", "start_method", "rank", "world_size", "local_rank", "local_world_size", "node_rank", "restart")
        self.write(**{name: getattr(rank, name) for name in fields}, host=socket.gethostname(), pid=os.getpid(), **about)
        if self.known:
            self.write(phase="command_started", time=self.origin)
        for name, mark in self.marks.items():
            self.write(phase=name, time=self.origin + mark)

    def write(self, **line: Any) -> None:
        """One line in one write: a rank that is killed leaves whole lines only."""
        if self._file >= 0:
            os.write(self._file, json.dumps(line).encode() + b"\n")


def read(folder: str | Path) -> list[dict[str, Any]]:
    """The ranks' files in ``folder``, by rank and restart.

    Returns:
        For each file what its lines without a phase said, and ``phases``: {name: seconds since rank 0's command started, on
        rank 0's clock}, in the order of time.
    """
    ranks = []
    for path in Path(folder).glob("rank-*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        about: dict[str, Any] = {"clock_offset_seconds": 0.0}
        times = {}
        for line in lines:
            if "phase" in line:
                times[line["phase"]] = line["time"]
            else:
                about |= line
        if "rank" in about:  # else it has only just been made
            ranks.append(about | {"phases": times})
    ranks.sort(key=lambda r: (r["rank"], r["restart"]))
    for about in ranks:
        origin = ranks[0]["phases"].get("command_started", min(ranks[0]["phases"].values(), default=0.0))
        shifted = {name: at + about["clock_offset_seconds"] - origin for name, at in about["phases"].items()}
        about["seconds"] = dict(sorted(shifted.items(), key=lambda item: item[1]))
    return ranks
