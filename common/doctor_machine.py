"""The doctor's checks of this machine: packages, GPUs, memory to share, limits, cores, and what is left of earlier runs."""

from __future__ import annotations

import glob
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from common.doctor_rows import Row, Subject, ask, finding, ok, unchecked

REPOSITORY = Path(__file__).resolve().parents[1]
LEAST_SHM = 1 << 30  # bytes; NCCL and DataLoader workers pass on data there, and containers get 64 MB
LEAST_FILES = 1024  # what Linux gives; a process holds a few for each rank and worker that it talks to
# Who sets what tells a rank who it is. What merely configures these programs is no leftover.
_LEFT = re.compile(
    r"RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|NODE_RANK|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_\w+|TORCHELASTIC_\w+|"
    r"OMPI_COMM_\w+|PMIX?_\w+|MPI_LOCALN?RANK\w*|HYDI_\w+|SLURM_\w+|SLURMD_\w+"
)
_SETTINGS = re.compile(
    r"SLURM_CONF|PMIX_MCA_\w+|PMI_DEBUG|TORCHELASTIC_ERROR_FILE|SLURM_(TIME_FORMAT|EXIT_ERROR|CLUSTERS|PARTITION)"
)
_EXPECTED = {"slurm": "SLURM", "mpi": "OMPI PMI PMIX MPI HYDI", "docker": "RANK WORLD LOCAL NODE", "torchrun": "", "ssh": ""}


def packages(subject: Subject) -> Row:
    """Python, torch, and whether they are ones that LaunchLab runs on."""
    found = subject.torch
    facts = {name: found.get(name) for name in ("python", "torch", "numpy", "mpi4py", "cuda", "nccl")} | {"commit": commit()}
    here = f"Python {found.get('python', '?')} ({sys.executable})"
    if tuple(int(n) for n in re.findall(r"\d+", str(found.get("python", "3.10")))[:2]) < (3, 10):
        return finding("versions", f"{here}: LaunchLab needs 3.10 or newer", "make PYTHON=python3.12 .venv/.ready", **facts)
    install = f"{sys.executable} -m pip install -r requirements.txt"
    if error := found.get("torch_error"):
        return finding("versions", f"{here}: torch cannot be imported ({error})", install, **facts)
    number = tuple(int(n) for n in re.findall(r"\d+", str(found.get("torch")))[:2])
    if not (2, 9) <= number < (3,):
        return finding("versions", f"{here}: torch {found.get('torch')}; LaunchLab runs on 2.9 or newer, below 3", install, **facts)
    told = [f"{name} {found[name]}" for name in ("torch", "numpy", "mpi4py") if found.get(name)]
    told += [f"commit {str(facts['commit'])[:10]}"] if facts["commit"] else []
    return ok("versions", f"{here}, {', '.join(told)}", **facts)


def commit(folder: Path = REPOSITORY) -> str | None:
    """The commit that is checked out, with ``+changes`` if files differ from it; None outside a git checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-c", f"safe.directory={folder}", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def backends(subject: Subject) -> Row:
    """Which backends this torch has."""
    if "backends" not in subject.torch:
        return unchecked("backends", "torch cannot be imported")
    found: list[str] = subject.torch["backends"]
    cuda, nccl = subject.torch.get("cuda"), subject.torch.get("nccl")
    if "gloo" not in found:
        return finding(
            "backends",
            "this torch has no gloo, over which ranks talk on CPUs",
            f"{sys.executable} -m pip install -r requirements.txt",
        )
    build = f"built for CUDA {cuda}" if cuda else "a CPU build"
    return ok("backends", f"{', '.join(found)}{f' {nccl}' if nccl else ''}; torch is {build}", backends=found, cuda=cuda, nccl=nccl)


def gpus(subject: Subject, driver: bool | None = None) -> Row:
    """GPUs for each rank of this machine. ``driver``: whether an NVIDIA driver is there; looked up by default."""
    if "gpus" not in subject.torch:
        return unchecked("gpus", "torch cannot be imported")
    driver = bool(glob.glob("/dev/nvidia[0-9]*")) if driver is None else driver
    names: list[str] = subject.torch["gpus"]
    ranks, visible = subject.ranks, subject.environment.get("CUDA_VISIBLE_DEVICES")
    facts: dict[str, Any] = {"gpus": names, "ranks": ranks}
    if driver and not names:
        if visible is not None and visible.strip() in ("", "-1"):
            why = f"CUDA_VISIBLE_DEVICES={visible} hides this machine's GPUs"
            return finding("gpus", why, "unset CUDA_VISIBLE_DEVICES", **facts)
        if not subject.torch.get("cuda"):
            rebuild = f"{sys.executable} -m pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
            return finding("gpus", "this machine has a GPU, and torch is a CPU build", rebuild, **facts)
        why = f"torch for CUDA {subject.torch['cuda']} cannot use this machine's GPU: its driver is older than that, or busy"
        return finding("gpus", why, "nvidia-smi   # then a torch for the CUDA version that it shows: make TORCH_INDEX=…", **facts)
    if not names:
        return ok("gpus", f"no CUDA device: {ranks} ranks here compute on the CPU", **facts)
    if ranks > len(names):
        why = f"{ranks} ranks and {len(names)} GPU{'s' * (len(names) > 1)}: NCCL needs a GPU for each rank (Duplicate GPU detected)"
        return finding("gpus", why, f"export NPROC_PER_NODE={len(names)}", **facts)
    return ok("gpus", f"{len(names)} ({', '.join(sorted(set(names)))}) for {ranks} ranks", **facts)


def shared_memory(subject: Subject, path: str = "/dev/shm", container: bool | None = None) -> Row:
    """Size of /dev/shm, in which NCCL and DataLoader workers hand over data."""
    try:
        size = os.statvfs(path)
    except OSError as error:
        return unchecked("/dev/shm", f"{path}: {error.strerror}")
    total, free = size.f_blocks * size.f_frsize, size.f_bavail * size.f_frsize
    container = any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv"))) if container is None else container
    facts = {"bytes": total, "free_bytes": free}
    told = f"{total / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB of it free"
    if total < LEAST_SHM:
        mend = "docker run --shm-size=1g …" if container else f"sudo mount -o remount,size=1g {path}"
        return finding("/dev/shm", f"{told}: too small for NCCL and for DataLoader workers (Bus error)", mend, **facts)
    if free < LEAST_SHM // 4:
        return finding("/dev/shm", f"{told}: nearly full, of files that ended programs have left?", f"ls -l {path}", **facts)
    return ok("/dev/shm", told, **facts)


def open_files(subject: Subject) -> Row:
    """How many files a process may open."""
    try:
        import resource
    except ImportError:
        return unchecked("open files", f"{sys.platform} has no such limit")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < LEAST_FILES and soft != resource.RLIM_INFINITY:
        told = f"{soft} at most: DataLoader workers and many ranks need more (Too many open files)"
        enough = hard == resource.RLIM_INFINITY or hard >= LEAST_FILES
        mend = f"ulimit -n {LEAST_FILES}" if enough else f"sudo prlimit --pid $$ --nofile={LEAST_FILES}:{LEAST_FILES}"
        return finding("open files", told, mend, soft=soft, hard=hard)
    return ok("open files", f"{soft} at most" if soft != resource.RLIM_INFINITY else "any number", soft=soft, hard=hard)


def affinity() -> set[int]:
    """The cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _could_use() -> set[int]:
    """The cores that this process could have if it asked for all: what its control group (cpuset) leaves of them."""
    code = "import os; os.sched_setaffinity(0, range(os.cpu_count())); print(*os.sched_getaffinity(0))"
    answer = ask([sys.executable, "-I", "-S", "-c", code], limit=5)
    return {int(word) for word in answer.out.split()} if answer.status == 0 else affinity()


def cpu_quota(own: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> float | None:
    """Cores' worth of time that this process's control groups allow; None: no limit (cgroups(7), cpu.max and cpu.cfs_quota_us)."""
    found = []
    try:
        rows = [row.split(":", 2) for row in Path(own).read_text().splitlines()]
    except OSError:
        return None
    for _, controllers, path in (row for row in rows if len(row) == 3):
        version_1 = "cpu" in controllers.split(",")
        if controllers and not version_1:
            continue
        for top in (f"{root}/{controllers}", f"{root}/cpu") if version_1 else (root, f"{root}/unified"):
            place = Path(path.lstrip("/"))
            for group in (Path(top, place), *(Path(top, above) for above in place.parents)):
                try:
                    if version_1:
                        words = [(group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")]
                    else:
                        words = (group / "cpu.max").read_text().split()
                    if words[0] not in ("max", "-1"):
                        found.append(int(words[0]) / int(words[1]))
                except (OSError, ValueError, IndexError, ZeroDivisionError):
                    continue
    return min(found, default=None)


def cores(subject: Subject, usable: int | None = None, quota: float | None = None) -> Row:
    """Cores here, those that this process may use, and the time that its control group gives it."""
    there, usable = os.cpu_count() or 1, len(affinity()) if usable is None else usable
    quota = cpu_quota() if quota is None else quota
    facts = {"cores": there, "usable": usable, "quota": quota}
    told = f"{usable} of {there} usable"
    if quota is not None and quota < usable:
        whole = max(1, int(quota / max(1, subject.ranks)))
        told += f", and a control group allows {quota:g} cores' worth of time: ranks with more threads are stopped again and again"
        return finding("cores", told, f"export THREADS={whole}", **facts)
    if usable < subject.ranks and usable < len(could := _could_use()):
        told += f", for {subject.ranks} ranks: this shell is bound to {'it' if usable == 1 else 'them'} and need not be"
        return finding("cores", told, f"taskset -pc {','.join(map(str, sorted(could)))} $$", **facts)
    return ok("cores", told, **facts)


def threads(subject: Subject, usable: int | None = None) -> Row:
    """Threads × ranks against cores."""
    usable = len(affinity()) if usable is None else usable
    for name in ("THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        first = (subject.environment.get(name) or "").partition(",")[0]
        if first.isascii() and first.isdigit() and int(first) > 1 and int(first) * subject.ranks > usable:
            told = f"{name}={first} × {subject.ranks} ranks on {usable} cores: threads wait for each other's cores"
            return finding(
                "threads", told, f"export {name}={max(1, usable // subject.ranks)}", threads=int(first), ranks=subject.ranks
            )
    share = max(1, usable // subject.ranks)
    told = f"{share} per rank with {subject.ranks} ranks on {usable} cores (LaunchLab sets it, alike under every launcher)"
    if subject.ranks > usable:
        told = f"1 per rank; {subject.ranks} ranks share {usable} core{'s' * (usable > 1)}, and take turns"
    return ok("threads", told, threads=share, ranks=subject.ranks)


def leftovers(subject: Subject) -> Row:
    """Variables that a launcher has set and a shell has kept."""
    env = subject.environment
    expected = tuple(_EXPECTED.get(subject.purpose or "", "").split())
    left = [
        name
        for name in sorted(env)
        if _LEFT.fullmatch(name) and not _SETTINGS.fullmatch(name) and env[name] and not (expected and name.startswith(expected))
    ]
    if "RANK" in left or "WORLD_SIZE" in left:
        left += [name for name in ("MASTER_ADDR", "MASTER_PORT") if env.get(name)]
    if left:
        shown = ", ".join(f"{name}={env[name][:40]}" for name in left[:6]) + (f" and {len(left) - 6} more" if len(left) > 6 else "")
        told = f"{shown}: left over from a launcher; programs take it for their own rank, and wait for others"
        return finding("variables", told, f"unset {' '.join(left)}", names=left)
    return ok("variables", "no launcher's variables are left over in this environment", names=[])


def orphans(subject: Subject, proc: Path = Path("/proc")) -> Row:
    """Ranks of a run whose launcher is gone: they hold memory, cores and ports."""
    if not (proc / "self").exists():
        return unchecked("orphans", "this system has no /proc")
    found = {}
    for folder in proc.glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            variables = dict(row.partition("=")[::2] for row in os.fsdecode((folder / "environ").read_bytes()).split("\0"))
            command = os.fsdecode((folder / "cmdline").read_bytes()).replace("\0", " ").strip()
        except (OSError, ValueError):
            continue  # gone by now, or another user's
        adopted = int(fields[1]) == 1 and folder.name != "1"
        own_start = "RANK" in variables and "WORLD_SIZE" in variables
        if adopted and own_start and "python" in command and fields[0] != "Z":
            found[int(folder.name)] = command
    if found:
        told = f"{len(found)} process{'es' * (len(found) > 1)} of a run whose launcher is gone: {next(iter(found.values()))[:80]}"
        return finding("orphans", told, f"kill {' '.join(map(str, sorted(found)))}", pids=sorted(found))
    return ok("orphans", "no rank of an ended run is left", pids=[])
