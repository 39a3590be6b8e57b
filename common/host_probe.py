"""What a host has to say about itself before a training is started on it. Sent there as it stands; standard library only.

It reads one question a line (JSON) from standard input and answers each with a line (JSON behind ``MARK``), until its input ends:
``{"ask": "facts", "root", "folder", "port"}``, ``{"ask": "time"}``, ``{"ask": "reach", "hosts", "port", "token"}``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

MARK = "launchlab-answer "  # a shell's start file may print things of its own
DEFAULT_PORT = 29500
REACH_S = 4.0
# What a node runs; what is compared.
CODE = ("launchers/torchrun.py", "common/*.py")


def code_of(root: str) -> dict[str, str]:
    """File → digest of the files that a node runs; empty where there are none."""
    files = sorted(file for pattern in CODE for file in Path(root).glob(pattern))
    return {file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}


def commit_of(root: str) -> str:
    """The commit that is checked out there, shortened; "" if git does not say."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        words = ["git", "-c", "safe.directory=*", "-C", root, "rev-parse", "--short", "HEAD"]
        return subprocess.run(words, capture_output=True, text=True, timeout=5).stdout.strip()
    return ""


def _torch() -> str:
    from importlib import metadata

    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def gpus() -> int:
    """GPUs that may be used here, counted without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len([name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit()])


def _listen(port: int, token: str) -> tuple[int, str]:
    """(port, "") of a listener that says ``token`` to whoever connects, or (0, why not)."""
    try:
        listener = socket.socket(socket.AF_INET6)
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    except OSError:
        listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))
        listener.listen(64)
    except OSError as error:
        listener.close()
        return 0, error.strerror or str(error)

    def serve() -> None:
        while True:
            with contextlib.suppress(OSError), listener.accept()[0] as peer:
                peer.sendall(token.encode())

    threading.Thread(target=serve, daemon=True).start()
    return listener.getsockname()[1], ""


def facts(root: str, folder: str, port: int | None, token: str) -> dict[str, Any]:
    """What is compared between hosts.

    With a ``token`` this host is the master: it listens on ``port`` (None: 29500, or a free one).
    """
    told: dict[str, Any] = {
        "python": "{}.{}.{}".format(*sys.version_info[:3]),
        "torch": _torch(),
        "gpus": gpus(),
        "code": code_of(root),
    }
    told |= {
        "commit": commit_of(root),
        "folder": os.path.isdir(folder) and os.access(folder, os.X_OK),
        "name": socket.gethostname(),
    }
    connection = os.environ.get("SSH_CONNECTION", "").split()
    told["address"] = connection[2] if len(connection) == 4 else ""
    if token:
        told["port"], told["port_error"] = _listen(DEFAULT_PORT if port is None else port, token)
        if port is None and not told["port"]:
            told["port"], told["port_error"] = _listen(0, token)
    return told


def reach(hosts: list[str], port: int, token: str) -> dict[str, Any]:
    """Which of the master's names or addresses leads from here to its listener, and by which own address; why the others do not."""
    errors: dict[str, str] = {}
    for host in hosts:
        try:
            with socket.create_connection((host, port), REACH_S) as connection:
                connection.settimeout(REACH_S)
                if connection.recv(64).decode(errors="replace") == token:
                    return {"reached": host, "own": connection.getsockname()[0], "errors": errors}
                errors[host] = f"{connection.getpeername()[0]} is another machine, or another program listens there"
        except (OSError, UnicodeError) as error:
            errors[host] = getattr(error, "strerror", None) or str(error)
    return {"reached": "", "own": "", "errors": errors}


def main() -> None:
    """Answers until the other side has no more questions."""
    ways: dict[str, Any] = {"facts": facts, "reach": reach, "time": lambda: {"time": time.time()}}
    for line in sys.stdin:
        question = json.loads(line)
        answer = ways[question.pop("ask")](**question)
        sys.stdout.write(f"{MARK}{json.dumps(answer)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
