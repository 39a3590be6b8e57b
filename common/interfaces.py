"""This machine's network interfaces, and which of them the kernel takes to reach a host. Standard library only."""

from __future__ import annotations

import ctypes
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_BSD = sys.platform == "darwin" or "bsd" in sys.platform  # a socket address begins with its length there


@dataclass(frozen=True)
class Interface:
    """One address of one network interface; an interface with several addresses is there once for each."""

    name: str
    """``eth0``"""
    address: str
    """``192.0.2.7`` or ``fd00::7``; of an address that holds on one link only, with it: ``fe80::7%eth0``"""
    family: int
    """``socket.AF_INET`` or ``socket.AF_INET6``"""

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine is reached through it."""
        return is_loopback(self.address)

    @property
    def one_link_only(self) -> bool:
        """Whether the address means nothing without the name of a link (``fe80::…``, 169.254.…)."""
        return self.address.lower().startswith("fe80:") or self.address.startswith("169.254.")


class _Ifaddrs(ctypes.Structure):
    """``struct ifaddrs`` up to the address: getifaddrs(3), the same on Linux and macOS."""


_Ifaddrs._fields_ = [
    ("next", ctypes.POINTER(_Ifaddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]


def _text(address: int | None, name: str) -> tuple[str, int] | None:
    """(address, family) of the ``struct sockaddr`` that is there; None if it is of no family that people connect by."""
    if not address:
        return None
    family = ctypes.string_at(address, 2)[1] if _BSD else int.from_bytes(ctypes.string_at(address, 2), sys.byteorder)
    if family == socket.AF_INET:
        return socket.inet_ntop(family, ctypes.string_at(address + 4, 4)), family
    if family == socket.AF_INET6:
        raw = ctypes.string_at(address + 8, 16)
        if raw[:2] == b"\xfe\x80":
            return f"{socket.inet_ntop(family, raw[:2] + bytes(2) + raw[4:])}%{name}", family  # macOS keeps the link in there
        return socket.inet_ntop(family, raw), family
    return None


def interfaces() -> list[Interface]:
    """Every IPv4 and IPv6 address of this machine's interfaces, in the kernel's order; empty where the system does not tell."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        get, free = libc.getifaddrs, libc.freeifaddrs
    except (OSError, AttributeError, TypeError):  # Windows
        return []
    get.argtypes, free.argtypes = [ctypes.POINTER(ctypes.POINTER(_Ifaddrs))], [ctypes.POINTER(_Ifaddrs)]
    first = ctypes.POINTER(_Ifaddrs)()
    if get(ctypes.byref(first)):
        return []
    found = []
    try:
        entry = first
        while entry:
            name = entry.contents.name.decode(errors="replace")
            if text := _text(entry.contents.address, name):
                found.append(Interface(name, *text))
            entry = entry.contents.next
    finally:
        free(first)
    return found


def addresses_of(host: str, port: int = 9) -> list[tuple[int, Any]]:
    """What ``host`` resolves to here, as (family, socket address); empty if it does not resolve."""
    try:
        return [(family, to) for family, _, _, _, to in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)]
    except (OSError, UnicodeError):  # the second for names that cannot be one
        return []


def route_to(host: str, port: int = 9) -> Interface | None:
    """The interface, with this machine's own address there, that the kernel takes to reach ``host``.

    A datagram socket is connected, which sends nothing and tells the source address (ip(7)): it needs nobody at the other end.

    Args:
        host: a name or address.
        port: any; nothing is sent.

    Returns:
        None if the name does not resolve or no route leads there.
    """
    for family, to in addresses_of(host, port):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(to)
                own = probe.getsockname()
            except OSError:
                continue
        address = own[0].partition("%")[0]
        here = [i for i in interfaces() if i.address.partition("%")[0] == address]
        if family == socket.AF_INET6 and own[3]:  # the same address may be on several links
            here = [i for i in here if i.name == socket.if_indextoname(own[3])] or here
        if here:
            return here[0]
    return None


def own_address(host: str) -> str | None:
    """This machine's address on the way to ``host``; None if none leads there."""
    route = route_to(host)
    return route.address if route else None


def way_out(master: str, others: Sequence[str]) -> tuple[Interface | None, str]:
    """The interface by which this node's ranks and those of other nodes reach each other, and why it is that one.

    Args:
        master: the host where rank 0 is, as this node calls it. Where that is this node itself, the name may lead to the loopback
            interface (Debian gives a host's own name 127.0.1.1), by which nobody else comes in.
        others: addresses of ranks on other nodes.
    """
    route = route_to(master)
    if route and not route.is_loopback:
        return route, f"the route to {master}"
    for other in others:
        if not is_loopback(other) and (back := route_to(other)):
            return back, f"the route to {other} of another node; {master} is the loopback interface here"
    return route, f"the route to {master}; all nodes are this machine"


def is_loopback(address: str) -> bool:
    """Whether an address is one by which a machine reaches itself: 127.…, ::1."""
    return address.startswith(("127.", "::ffff:127.")) or address == "::1"


def way_in(host: str) -> str | None:
    """This machine's own address, by which those come in who meet at ``host``.

    Returns:
        None where ``host`` is this machine by its loopback interface and there are several others: which one is meant is open.
    """
    route = route_to(host)
    if route and not route.is_loopback:
        return route.address
    outside = [i.address for i in interfaces() if not i.is_loopback and not i.one_link_only]
    names = {i.name for i in interfaces() if i.address in outside}
    return outside[0] if len(names) == 1 else None


def leads_back(host: str) -> bool:
    """Whether a name resolves here, and to loopback addresses only."""
    found = [str(to[0]) for _, to in addresses_of(host)]
    return bool(found) and all(map(is_loopback, found))


def is_own(host: str) -> bool:
    """Whether ``host`` leads to this machine: it resolves to a loopback address or to one of an interface here."""
    mine = {i.address.partition("%")[0] for i in interfaces()}
    found = {str(to[0]).partition("%")[0] for _, to in addresses_of(host)}
    return any(is_loopback(address) or address in mine for address in found)
