"""Which of a machine's addresses the other ranks reach: tried out, since a docker0 or a second network has addresses too."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from common.errors import UsageError
from common.interfaces import interfaces

_TOKEN = 16  # bytes
_LIMIT_S = 5.0


@dataclass(frozen=True)
class Told:
    """What ranks must know to try."""

    host: str
    addresses: tuple[str, ...]
    port: int
    token: bytes
    """What the right process answers: 172.17.0.1 is every host with Docker."""


class Probe:
    """Answers whoever connects, on all of this machine's addresses, until it is closed."""

    def __init__(self, address: str | None = None) -> None:
        """Listens on a free port.

        Args:
            address: the only one to be tried; by default all of this machine's that others may reach, IPv4 first.
        """
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=both)
        outside = [i.address for i in interfaces() if not i.is_loopback and not i.one_link_only]
        addresses = (address,) if address else tuple(outside)
        self.told = Told(socket.gethostname(), addresses, self._listener.getsockname()[1], os.urandom(_TOKEN))
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                with connection, suppress(OSError):
                    connection.sendall(self.told.token)

    def __enter__(self) -> Probe:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Listens no longer."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept (Linux)
        self._listener.close()


def reached(told: Told, limit: float = _LIMIT_S) -> list[str]:
    """Those of ``told.addresses`` at which that very process answers, all tried at once within ``limit`` seconds."""
    found: list[str] = []

    def attempt(address: str) -> None:
        with suppress(OSError, UnicodeError), socket.create_connection((address, told.port), timeout=limit) as connection:
            if connection.recv(_TOKEN, socket.MSG_WAITALL) == told.token:
                found.append(address)

    threads = [threading.Thread(target=attempt, args=(address,), daemon=True) for address in told.addresses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit)
    return [address for address in told.addresses if address in found]


def reached_by_all(told: Told, by_rank: Sequence[tuple[str, Sequence[str]]]) -> str:
    """The first address that every rank reaches.

    Args:
        told: what they tried.
        by_rank: of each rank its host and what it ``reached``.

    Raises:
        UsageError: there is none.
    """
    for address in told.addresses:
        if all(address in found for _, found in by_rank):
            return address
    tried = ", ".join(told.addresses) or "none but the loopback interface's"
    away = sorted({host for host, found in by_rank if not set(told.addresses) & set(found)})
    from_where = ", ".join(away) or "all other hosts at one and the same"
    raise UsageError(
        f"rank 0 on {told.host} is not reached from {from_where} (tried {tried}); give --master_addr (or MASTER_ADDR) a name or "
        "address of that host by which the others reach it, or leave it out, and open the firewall between them"
    )
