"""The doctor's hand on a host: sent there as text (``python -I -S -c``), it does what lines of JSON on its stdin ask for.

Standard library only, any Python 3.10 or newer: LaunchLab need not be there yet. It ends with its stdin, so with its ssh.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from typing import Any

GREETING = b"launchlab doctor\n"


def listen(ports: list[int]) -> dict[int, Any]:
    """Listens on each port (0: any) until the end; {asked: the port, or why not}."""
    found: dict[int, Any] = {}
    for asked in ports:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", asked))
            listener.listen(64)
        except OSError as error:
            found[asked] = error.strerror or str(error)
            continue
        found[asked] = listener.getsockname()[1]
        threading.Thread(target=greet, args=(listener,), daemon=True).start()
    return found


def greet(listener: socket.socket) -> None:
    """Says who it is to all who come."""
    while True:
        try:
            connection = listener.accept()[0]
            connection.sendall(GREETING)
            connection.close()
        except OSError:
            time.sleep(0.05)


def reach(name: str, port: int, limit: float) -> str:
    """Connects to a listener of another host: "" or why not."""
    try:
        with socket.create_connection((name, port), timeout=limit) as connection:
            connection.settimeout(limit)
            return "" if connection.recv(64) == GREETING else "somebody else answers there"
    except socket.gaierror:
        return "the name does not resolve"
    except TimeoutError:
        return f"no answer within {limit:g} s"
    except OSError as error:
        return error.strerror or str(error)


def reach_all(targets: list[Any], limit: float) -> list[str]:
    """``reach`` to each (name, port), side by side."""
    found = [""] * len(targets)

    def one(number: int) -> None:
        found[number] = reach(targets[number][0], targets[number][1], limit)

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(len(targets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * limit + 3)
    return found


def answer(asked: dict[str, Any]) -> Any:
    """Does one thing."""
    if asked["do"] == "time":
        return time.time()
    if asked["do"] == "listen":
        return listen(asked["ports"])
    if asked["do"] == "reach":
        return reach_all(asked["targets"], asked["seconds"])
    return {
        "host": socket.gethostname(),
        "from": (os.environ.get("SSH_CONNECTION") or "").split(),
        "python": sys.version.split()[0],
    }


def main() -> None:
    """Answers until nobody asks any more."""
    for line in sys.stdin:
        sys.stdout.write(f"doctor {json.dumps(answer(json.loads(line)))}\n")
        sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
