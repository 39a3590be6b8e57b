"""A switch in user space that delivers every frame late: ``--delay`` of a virtual cluster where the kernel has no netem.

    python -I -S virtual_relay.py SECONDS INTERFACE...

Each interface is the near end of a host's cable. Frames travel with the kernel's notes on checksums and segments (PACKET_VNET_HDR,
packet(7); struct virtio_net_hdr), so that large ones stay whole. Standard library only.
"""

from __future__ import annotations

import ctypes
import heapq
import os
import select
import socket
import sys
import time

_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_HEADER = 10  # struct virtio_net_hdr
_ALL = 0x0003  # ETH_P_ALL
_BUFFER = 16 << 20  # bytes that may wait in a port
_PR_SET_TIMERSLACK = 29


def _port(interface: str) -> socket.socket:
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
    port.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    port.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        port.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
    port.bind((interface, 0))
    port.setblocking(False)
    return port


def relay(seconds: float, interfaces: list[str]) -> None:
    """Delivers for ever. A frame for an address not heard of yet goes to all other ports."""
    ports = [_port(name) for name in interfaces]
    homes: dict[bytes, socket.socket] = {}
    waiting: list[tuple[float, int, socket.socket, bytes]] = []
    count = 0
    while True:
        wait = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for port in select.select(ports, [], [], wait)[0]:  # microseconds, where poll(2) counts milliseconds
            try:
                frame = port.recv(1 << 17)
            except OSError:  # cut
                continue
            count += 1
            homes[frame[_HEADER + 6 : _HEADER + 12]] = port
            heapq.heappush(waiting, (time.monotonic() + seconds, count, port, frame))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, source, frame = heapq.heappop(waiting)
            home = homes.get(frame[_HEADER : _HEADER + 6])
            for port in [home] if home else ports:
                if port is not source:
                    try:
                        port.send(frame)
                    except OSError:  # cut, or full: a switch drops it
                        pass


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)  # nanoseconds
    with socket.socket(fileno=int(os.environ["LAUNCHLAB_BORN"])) as line:  # virtual_host.FD
        line.send(b"up")
    relay(float(sys.argv[1]), sys.argv[2:])
