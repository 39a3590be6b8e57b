"""What a container may use of the machine's processors: ``docker run --cpus=1`` limits time, which an affinity does not show."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path, PurePosixPath


def cpu_quota(mount: str | Path = "/sys/fs/cgroup", membership: str | Path = "/proc/self/cgroup") -> float | None:
    """Processors' worth of time that this process and its cgroup may use together; None without a limit, or without cgroups.

    The smallest limit of the cgroup and those above it, as far as they are visible (a container sees its own as the root).
    Both versions: https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max) and
    https://docs.kernel.org/scheduler/sched-bwc.html (cpu.cfs_quota_us).

    Args:
        mount: where the hierarchies are mounted.
        membership: the process's cgroups, as cgroups(7) describes the file.
    """
    limits: list[float] = []
    with suppress(OSError):
        for line in Path(membership).read_text(encoding="utf-8").splitlines():
            number, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            places = ["", "unified"] if number == "0" else [controllers, "cpu"] if "cpu" in controllers.split(",") else []
            inside = PurePosixPath("/", path)
            for folder in (Path(mount, place, str(up).lstrip("/")) for place in places for up in (inside, *inside.parents)):
                if (limit := _limit(folder)) is not None:
                    limits.append(limit)
    return min(limits, default=None)


def _limit(folder: Path) -> float | None:
    """The limit of one cgroup, in processors."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if int(quota) < 0 else int(quota) / int(period)
    return None
