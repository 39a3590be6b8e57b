"""SLURM's short forms written out: ``lab[1-3,07],lone`` is a list of nodes, ``2(x3),1`` the tasks on each of four."""

from __future__ import annotations

import re

from common.errors import UsageError

MOST = 65536  # SLURM's own limit (MAX_RANGE in its src/common/hostlist.c)
_ENTRY = re.compile(r"(?:[^\[\],\s]|\[[^\[\]]*\])+")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?", re.ASCII)


def expand_nodes(text: str, name: str = "SLURM_STEP_NODELIST") -> list[str]:
    """The nodes of a list, as ``scontrol show hostnames`` would write them, in its order.

    Args:
        text: names with ranges in brackets, zeros before numbers kept: ``lab[1-3,07],gpu-a[01-02]x,lone``.
        name: where it was found.

    Raises:
        UsageError: it is no such list.
    """
    nodes: list[str] = []
    entries: list[str] = []
    end = 0
    for match in _ENTRY.finditer(text):
        if text[end : match.start()] != ("," if entries else ""):
            break
        entries.append(match[0])
        end = match.end()
    if not entries or end != len(text):
        raise _refused(name, text, "no list of nodes", "lab[1-3,07],lone")
    for entry in entries:
        written = [""]
        for number, part in enumerate(re.split(r"\[([^\]]*)\]", entry)):  # every second is the inside of a bracket
            ends = _numbers(part) if number % 2 else [part]
            if not ends:
                raise _refused(name, text, f"[{part}] is no list of numbers", "lab[1-3,07]")
            if len(written) * len(ends) + len(nodes) > MOST:
                raise UsageError(f"{name}={text[:80]}: more than {MOST} nodes, which SLURM itself refuses")
            written = [front + back for front in written for back in ends]
        nodes += written
    return nodes


def _numbers(text: str) -> list[str]:
    """``1-3,07`` as 1, 2, 3, 07; nothing if it is not of this form."""
    numbers: list[str] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or first > last:
            return []
        if last - first >= MOST:
            return ["0"] * (MOST + 1)
        numbers += [str(n).zfill(len(match[1])) for n in range(first, last + 1)]
    return numbers


def expand_tasks(text: str, name: str = "SLURM_STEP_TASKS_PER_NODE") -> list[int]:
    """The tasks on each node: ``2(x3),1`` is [2, 2, 2, 1].

    Args:
        text: numbers with repetitions.
        name: where it was found.

    Raises:
        UsageError: it is no such list.
    """
    tasks: list[int] = []
    for part in text.split(","):
        match = _TASKS.fullmatch(part)
        if match is None:
            raise _refused(name, text, "no numbers of tasks", "2(x3),1")
        if len(tasks) + int(match[2] or 1) > MOST:
            raise UsageError(f"{name}={text[:80]}: more than {MOST} nodes, which SLURM itself refuses")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _refused(name: str, text: str, what: str, example: str) -> UsageError:
    return UsageError(f"{name}={text[:80]!r}: {what}; SLURM writes {example}: start this with srun, which sets it")
