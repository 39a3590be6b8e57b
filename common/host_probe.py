"""What a host has to say about itself before anything is started on it. Sent there as it stands; standard library only.

It reads one question a line (JSON) from standard input and answers each with a line (JSON behind ``MARK``), until its input ends,
so no longer than its ssh. ``ask`` names one of the functions in ``ANSWERS``, the rest are its arguments:
``{"ask": "listen", "ports": [29500, 0], "token": "f00"}``.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "launchlab-answer "  # a shell's start file may print things of its own
DEFAULT_PORT = 29500
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


def who() -> dict[str, Any]:
    """Its name, and SSH_CONNECTION: our address and port, its address and port."""
    return {"host": socket.gethostname(), "from": os.environ.get("SSH_CONNECTION", "").split()}


def facts(root: str, folder: str) -> dict[str, Any]:
    """What is compared between hosts: of the project in ``root``, to be started in ``folder``."""
    return who() | {
        "python": "{}.{}.{}".format(*sys.version_info[:3]),
        "torch": _torch(),
        "gpus": gpus(),
        "code": code_of(root),
        "commit": commit_of(root),
        "folder": os.path.isdir(folder) and os.access(folder, os.X_OK),
    }


def listen(ports: list[int], token: str) -> dict[str, int | str]:
    """Says ``token`` to whoever connects to one of ``ports`` (0: any); for each, as text, the port or why it cannot be used."""
    found: dict[str, int | str] = {}
    for port in ports:
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
            found[str(port)] = error.strerror or str(error)
            continue
        found[str(port)] = listener.getsockname()[1]
        threading.Thread(target=_greet, args=(listener, token.encode()), daemon=True).start()
    return found


def _greet(listener: socket.socket, token: bytes) -> None:
    while True:
        try:
            with listener.accept()[0] as peer:
                peer.sendall(token)
        except OSError:
            time.sleep(0.05)


def _attempt(host: str, port: int, token: str, seconds: float) -> str:
    """Why the listener at ``host`` does not say ``token``; "" if it does."""
    try:
        with socket.create_connection((host, port), seconds) as connection:
            connection.settimeout(seconds)
            if connection.recv(64).decode(errors="replace") == token:
                return ""
            return f"{connection.getpeername()[0]} is another machine, or another program listens there"
    except TimeoutError:
        return f"no answer within {seconds:g} s"
    except (socket.gaierror, UnicodeError):
        return "the name does not resolve"
    except OSError as error:
        return error.strerror or str(error)


def reach(targets: list[tuple[str, int]], token: str, seconds: float) -> list[str]:
    """For each (host, port): "" if ``listen`` of another host answers there with ``token`` within ``seconds``, or why not."""
    found = ["no answer"] * len(targets)

    def attempt(number: int) -> None:
        found[number] = _attempt(*targets[number], token, seconds)

    threads = [threading.Thread(target=attempt, args=(number,), daemon=True) for number in range(len(targets))]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 2 * seconds + 3  # a name that takes long to resolve is no connection's delay
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return found


ANSWERS: dict[str, Callable[..., Any]] = {"who": who, "facts": facts, "listen": listen, "reach": reach, "time": time.time}


def main() -> None:
    """Answers until the other side has no more questions."""
    for line in sys.stdin:
        question = json.loads(line)
        answer = ANSWERS[question.pop("ask")](**question)
        sys.stdout.write(f"{MARK}{json.dumps(answer)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
