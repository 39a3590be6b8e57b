"""The doctor's checks of the programs that launch: torchrun, ssh, srun, docker or podman."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from common.doctor_rows import Row, Subject, ask, finding, ok, unchecked


def _absent(check: str, subject: Subject, purpose: str, told: str, mend: str) -> Row:
    """A tool that is not here is a finding for who wants it."""
    return finding(check, told, mend) if subject.purpose == purpose else unchecked(check, f"{told} (needed for {purpose} only)")


def torchrun(subject: Subject) -> Row:
    """Whether the torchrun on PATH is this Python's."""
    beside = Path(sys.executable).parent / "torchrun"
    found = shutil.which("torchrun", path=subject.environment.get("PATH"))
    own = "torch" in subject.torch and "torch_error" not in subject.torch
    front = f"export PATH={beside.parent}:$PATH" if beside.exists() else f"{sys.executable} -m torch.distributed.run …"
    if not found:
        told = "torchrun is not on PATH"
        return _absent("torchrun", subject, "torchrun", told, front) if own else unchecked("torchrun", told)
    if not (beside.exists() and os.path.samefile(found, beside)):
        told = f"{found} is not of {sys.executable}: it starts ranks with another Python, and another torch"
        return finding("torchrun", told, front, path=found)
    return ok("torchrun", f"{found} is this Python's", path=found)


def ssh(subject: Subject) -> Row:
    """Whether there is an ssh to reach hosts with."""
    found = shutil.which("ssh", path=subject.environment.get("PATH"))
    if not found:
        return _absent("ssh", subject, "ssh", "ssh is not installed", "sudo apt install openssh-client")
    version = ask([found, "-V"], limit=5, env=subject.environment)
    return ok("ssh", f"{found} ({(version.err or version.out).strip()[:40]})", path=found)


def slurm(subject: Subject) -> Row:
    """Whether srun is here, and its controller answers."""
    found = shutil.which("sinfo", path=subject.environment.get("PATH"))
    if not found or not shutil.which("srun", path=subject.environment.get("PATH")):
        return _absent("slurm", subject, "slurm", "srun is not on PATH", "sudo apt install slurm-wlm   # or go to a login node")
    answer = ask([found, "--noheader", "--format=%D %T"], limit=6, env=subject.environment)
    if answer.status != 0:
        told = f"srun is here, but no controller answers ({answer.last_line[:120]})"
        return _absent("slurm", subject, "slurm", told, "scontrol ping   # on a node of the cluster")
    nodes = sum(int(row.split()[0]) for row in answer.out.splitlines() if row.split()[:1] and row.split()[0].isdigit())
    if not nodes:
        return _absent("slurm", subject, "slurm", "the controller knows no node", "scontrol show nodes")
    return ok("slurm", f"{nodes} node{'s' * (nodes > 1)}: {', '.join(answer.out.split(chr(10))[:3]).strip(', ')}", nodes=nodes)


def docker(subject: Subject) -> Row:
    """Whether docker or podman is here, and answers."""
    path = subject.environment.get("PATH")
    found = [program for name in ("docker", "podman") if (program := shutil.which(name, path=path))]
    if not found:
        return _absent("docker", subject, "docker", "neither docker nor podman is installed", "sudo apt install podman")
    why = ""
    for program in found:
        name = Path(program).name
        answer = ask([program, "info", "--format", "{{.ServerVersion}}" if name == "docker" else "{{.Version.Version}}"],
                     limit=8, env=subject.environment)  # fmt: skip
        if answer.status == 0:
            return ok("docker", f"{program} {answer.out.strip()}; ranks in containers on several machines need --network host")
        why = why or f"{program} does not answer ({answer.last_line[:120]})"
    return _absent("docker", subject, "docker", why, "sudo systemctl start docker")
