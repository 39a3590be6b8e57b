"""Looking up names of this machine without asking the network."""

from __future__ import annotations

import ctypes
import socket
import sys
from pathlib import Path

from common.errors import UsageError


def _configured() -> str:
    """What /etc/nsswitch.conf says about hosts; glibc's own default where it says nothing (nsswitch.conf(5))."""
    try:
        lines = Path("/etc/nsswitch.conf").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].partition("#")[0].strip() for line in lines if line.startswith("hosts:")), "files dns")


def _look_up_hosts_in(sources: str) -> None:
    configure = getattr(ctypes.CDLL(None), "__nss_configure_lookup", None) if sys.platform == "linux" else None  # glibc's
    if configure:
        configure(b"hosts", sources.encode())


def from_files_only() -> None:
    """From here on this process looks up host names and addresses in /etc/hosts only (glibc; elsewhere nothing changes).

    Both ends of a connection to PyTorch's store look up the name of the other's address, for their log. 127.0.0.1 is mapped to
    IPv6 by then, which /etc/hosts does not list, so a name server is asked: 5 to 10 s where none answers, and where one drops some
    of many questions at once, the store stands still for all (64 ranks: 10 to 17 s to join, 1 s without asking).
    """
    _look_up_hosts_in("files")


def as_configured() -> None:
    """From here on as /etc/nsswitch.conf says again."""
    _look_up_hosts_in(_configured())


def check_known(host: str, what: str) -> None:
    """Refuses a host that has no address here: ranks would look for it until their patience ends.

    Args:
        host: a name or an address.
        what: where the name comes from.

    Raises:
        UsageError: it is not known here.
    """
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        raise UsageError(
            f"{host} ({what}): no address known on {socket.gethostname()} ({error.strerror}); give --master_addr and an address "
            "that all nodes reach, or enter the name in /etc/hosts"
        ) from None
