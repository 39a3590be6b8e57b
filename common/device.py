"""Where a rank computes: its device and its share of the cores."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress

import torch

from common.config import TrainConfig
from common.errors import UsageError
from common.rank import Rank


def usable_cores() -> set[int]:
    """The cores that this process may run on (all of them where the system has no affinity)."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cores_of(processes: Iterable[int]) -> set[int]:
    """The cores that any of ``processes`` (process ids) may run on; of one that is gone, or not ours to ask, none."""
    cores: set[int] = set()
    for pid in processes if hasattr(os, "sched_getaffinity") else ():
        with suppress(OSError):
            cores |= os.sched_getaffinity(pid)
    return cores


def share_of_cores(mine: Collection[int], all_local: Sequence[Collection[int]], quota: float | None = None) -> int:
    """Threads for a rank: its cores, shared evenly with the local ranks that may use the same ones.

    Ranks that a launcher has bound to cores of their own (Open MPI does) share with nobody. ``quota`` is this rank's part of the
    processors' time that its container has (``cgroup.cpu_quota``): with more threads than that all stand still in turn (two
    threads on a quota of one: a training takes 2.5 to 7 times as long as with one).
    """
    sharing = sum(1 for cores in all_local if set(cores) & set(mine))
    share = len(mine) // max(1, sharing)
    return max(1, share if quota is None else min(share, int(quota)))


def choose_device(config: TrainConfig, rank: Rank) -> torch.device:
    """This rank's device; a CUDA rank's current device is set to it.

    Raises:
        UsageError: the device that was asked for is not there, or NCCL would get two ranks on one GPU.
    """
    gpus = visible_gpus()
    enough = gpus >= rank.local_world_size
    if config.backend == "nccl" and not enough:
        raise UsageError(
            f"--backend nccl with {rank.local_world_size} ranks and {gpus} GPUs on this node: NCCL needs a GPU for each rank; "
            f"start at most {gpus} ranks, or use --backend gloo" if gpus else
            "--backend nccl: this machine has no CUDA device; use --backend gloo"
        )  # fmt: skip
    if config.device == "cuda" and not enough:
        raise UsageError(
            f"--device cuda with {rank.local_world_size} ranks and {gpus} GPUs on this node: each rank needs one; "
            + (f"start at most {gpus} ranks, or use --device cpu" if gpus else "use --device cpu")
        )
    if config.backend == "nccl" and config.device in ("cpu", "mps"):
        raise UsageError(f"--backend nccl with --device {config.device}: NCCL moves CUDA tensors only; use --backend gloo")
    mps = torch.backends.mps.is_available()
    if config.device == "mps" and not mps:
        raise UsageError("--device mps: this machine has no Apple GPU that PyTorch can use; use --device cpu")
    if config.device == "mps" and config.precision == "fp64":
        raise UsageError("--device mps with --precision fp64: Apple GPUs have no float64; use --device cpu")
    if config.device == "cuda" or (config.device == "auto" and gpus and enough):
        device = torch.device("cuda", rank.local_rank)
        torch.cuda.set_device(device)
        return device
    if config.device == "mps" or (config.device == "auto" and mps and config.precision != "fp64"):
        return torch.device("mps")
    return torch.device("cpu")


def choose_backend(config: TrainConfig, device: torch.device) -> str:
    """The process group's backend for ``device``."""
    if config.backend != "auto":
        return config.backend
    return "nccl" if device.type == "cuda" else "gloo"


def wait_for(device: torch.device) -> None:
    """Returns when the device has done all that was asked of it, so that a clock read next tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_bytes() -> int | None:
    """The most memory this process has held, in bytes; None where the system does not tell."""
    try:
        with open("/proc/self/status") as status:  # not ru_maxrss: a child starts with its parent's
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, where this is reached


def shared_out_memory_bytes() -> int | None:
    """This process's proportional set size in bytes: what it has alone, and of each shared page its share (proc(5), smaps_rollup).

    The ranks' sum is what they need together, which their resident sizes overstate. None where the system does not tell.
    """
    try:
        with open("/proc/self/smaps_rollup") as rollup:
            return next(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return None


def visible_gpus() -> int:
    """CUDA devices that this process may use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
