"""Algorithm and bus bandwidth of a collective, as nccl-tests defines them; sizes in bytes as text.

Source: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md. Algorithm bandwidth is size / time; the size S is that
of the whole: for all_gather what every rank has in the end, for reduce_scatter what every rank has at the start, so S is N times
each rank's part. Bus bandwidth is the algorithm bandwidth times the share of S that must cross each rank's link whatever the
algorithm: 2(N-1)/N for all_reduce, (N-1)/N for all_gather and reduce_scatter, 1 for broadcast. A GB is 10⁹ bytes there.
"""

from __future__ import annotations

import re

COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "reduce_scatter")
ITEM = 4  # bytes of a float32
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def bus_factor(collective: str, ranks: int) -> float:
    """Bus bandwidth / algorithm bandwidth; 0 for one rank, which has nobody to send to (broadcast is 1 all the same)."""
    return {
        "all_reduce": 2 * (ranks - 1) / ranks,
        "all_gather": (ranks - 1) / ranks,
        "reduce_scatter": (ranks - 1) / ranks,
        "broadcast": 1.0,
    }[collective]


def whole_bytes(collective: str, size: int, ranks: int) -> int:
    """The bytes that are moved where ``size`` is asked for: whole float32 values, as many for each rank; at least one each."""
    parts = ranks if collective in ("all_gather", "reduce_scatter") else 1
    return max(1, size // (ITEM * parts)) * ITEM * parts


def parse_size(text: str) -> int:
    """Bytes from ``64``, ``4K``, ``4KB``, ``4 MiB``: K, M and G are 2¹⁰, 2²⁰ and 2³⁰, as nccl-tests reads them.

    Raises:
        ValueError: its text says what is allowed.
    """
    found = re.fullmatch(r"(\d+)\s*([KMG]?)(I?B)?", text.strip().upper())
    number = int(found[1]) * _UNITS[found[2]] if found else 0
    if number < ITEM:
        raise ValueError(f"a size of {ITEM} bytes or more, such as 1024, 4KB, 64MB (K = 1024)")
    return number


def size_text(n_bytes: int) -> str:
    """``4 MiB``, ``1.5 KiB``, ``12 B``."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.4g} {name}"
    return f"{n_bytes} B"
