"""Between the watchers (``common.watch``) of a run's nodes: JSON lines over TCP, node 0's watcher in the middle.

Node 0's watcher listens on any free port; the others learn it, and a token, from the store through which the ranks meet. Who does
not show the token is hung up on. Whoever holds it could also reach the store, so it needs no more secrecy than that: the network
between the nodes is trusted, as PyTorch's own connections trust it.

Nothing depends on this link: where it cannot be made, each node's watcher sees to its own ranks only.
Standard library only: it is part of the watcher's program.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

HEARTBEAT_S = 1.0
SUSPECT_S = 4.0  # three heartbeats missed: named, if a rank reports at the same time that it lost another
SILENT_S = 20.0  # above what a full network or a host that swaps takes; gloo's own time-out for the same is minutes
CONNECT_S = 5.0  # for each of node 0's addresses, and for the first word on a connection
LEAVE_S = 1.0  # to send the last words
GONE = "is gone without a word (the host is down, or all its processes were killed)"
NOT_ANSWERED = "has not answered for {:.0f} s (the host is down, or the network between is cut)"
_MOST_BYTES = 1 << 22
_MOST_STRANGERS = 64

Message = dict[str, Any]


class Peer:
    """Another node's watcher, at the other end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        """``connection`` is up, or will be."""
        self.connection = connection
        connection.setblocking(False)
        self.known = False
        self.done = False  # its ranks' work is done, so that its silence means nothing
        self.about: Message = {}
        self.since = self.heard_at = time.monotonic()
        self._received = self._unsent = b""

    @property
    def name(self) -> str:
        """For a sentence: ``Node 1 (node2, ranks 2, 3)``."""
        ranks = self.about.get("ranks", [])
        return (
            f"Node {self.about.get('node')} ({self.about.get('host')}, rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))})"
        )

    def send(self, **message: Any) -> None:
        """Sends what fits now; the rest goes with ``flush``."""
        if len(self._unsent) < _MOST_BYTES:  # else the other side has long been silent
            self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> bool:
        """Sends what is left; whether nothing is."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self.connection.send(self._unsent) :]
        except BlockingIOError:
            return False
        except OSError:  # reading tells of it
            self._unsent = b""
        return True

    def read(self) -> tuple[list[Message], bool]:
        """What it said, and whether the connection still stands. Nonsense ends it."""
        try:
            data = self.connection.recv(1 << 20)
        except BlockingIOError:
            return [], True
        except OSError:
            data = b""
        *lines, self._received = (self._received + data).split(b"\n")
        try:
            messages = [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError, RecursionError):
            return [], False
        self.heard_at = time.monotonic()
        return messages, bool(data) and len(self._received) < _MOST_BYTES


class Links:
    """This watcher's connections to those of other nodes."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        introduce: Callable[[], Message],
        heard: Callable[[Peer, Message], None],
        lost: Callable[[Peer, str], None],
    ) -> None:
        """Connects nothing yet.

        Args:
            selector: gets a callable for each connection, to be called when there is something to read.
            introduce: gives this node's index, host and ranks.
            heard: called for each message of a watcher that has introduced itself, and first for that ("hello").
            lost: called when such a watcher has gone, or gone silent, before its ranks' work was done; with the cause in words.
        """
        self._selector, self._introduce, self._heard, self._lost = selector, introduce, heard, lost
        self._listener: socket.socket | None = None
        self._token = ""
        self._peers: list[Peer] = []
        self._candidates: list[tuple[str, int]] = []
        self._looked_at = time.monotonic()
        self._met: dict[Any, int] = {}  # node → its ranks, of all that have ever introduced themselves
        self.middle = False
        """Whether this is node 0's watcher."""

    # ------------------------------------------------------------------------------------------- making a connection

    def listen(self) -> Message:
        """Lets the other nodes in from now on: port and token, for them to know; nothing where that is not possible."""
        if not self._listener:
            try:
                family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
                both = family == socket.AF_INET6
                self._listener = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=both)
            except OSError:
                return {}
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ, self._welcome)
            self._token = os.urandom(16).hex()
            self.middle = True
        return {"port": self._listener.getsockname()[1], "token": self._token}

    def _welcome(self) -> None:
        assert self._listener
        with contextlib.suppress(OSError):
            while True:
                connection = self._listener.accept()[0]
                if sum(not peer.known for peer in self._peers) < _MOST_STRANGERS:
                    self._add(Peer(connection), selectors.EVENT_READ)
                else:
                    connection.close()

    def connect(self, addresses: list[str], port: int, token: str) -> None:
        """Begins to connect to node 0's watcher, at the first of ``addresses`` (numbers, not names) that lets us in."""
        if not self._peers and not self._candidates:
            self._token, self._candidates = token, [(address, port) for address in addresses]
            self._try_next()

    def _try_next(self) -> None:
        while self._candidates:
            address, port = self._candidates.pop(0)
            with contextlib.suppress(OSError):
                connection = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
                peer = Peer(connection)
                with contextlib.suppress(BlockingIOError):
                    connection.connect((address, port))
                self._add(peer, selectors.EVENT_WRITE)
                return

    def _add(self, peer: Peer, event: int) -> None:
        peer.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peers.append(peer)
        self._selector.register(peer.connection, event, lambda: self._ready(peer))

    def _ready(self, peer: Peer) -> None:
        if self._selector.get_key(peer.connection).events == selectors.EVENT_WRITE:  # connected, or refused
            if peer.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._drop(peer)
                return
            self._selector.modify(peer.connection, selectors.EVENT_READ, lambda: self._ready(peer))
            peer.send(event="hello", token=self._token, **self._introduce())
            return
        messages, stands = peer.read()
        for message in messages:
            self._take(peer, message)
        if not stands and peer in self._peers:
            self._drop(peer)
            if peer.known and not peer.done:
                self._lost(peer, GONE)

    def _take(self, peer: Peer, message: Message) -> None:
        event = message.get("event")
        if not peer.known:
            from hmac import compare_digest

            given = str(message.get("token", "")).encode()
            if event != "hello" or (self.middle and not compare_digest(given, self._token.encode())):
                self._drop(peer)
                return
            peer.known, self._candidates = True, []
            peer.send(event="hello" if self.middle else "here", **self._introduce())  # a rank may have come meanwhile
        if event in ("hello", "here"):
            peer.about = {name: message.get(name) for name in ("node", "host")} | {"ranks": sorted(message.get("ranks", []))}
            self._met[peer.about["node"]] = len(peer.about["ranks"])
        if event in ("done", "bye"):
            peer.done = True
        elif event != "alive" and peer in self._peers:
            self._heard(peer, message)

    def _drop(self, peer: Peer) -> None:
        if peer in self._peers:
            self._peers.remove(peer)
            self._selector.unregister(peer.connection)
            peer.connection.close()
            if not peer.known and not self.middle:
                self._try_next()

    # ----------------------------------------------------------------------------------------------------- using them

    def others(self) -> list[Peer]:
        """The watchers of nodes that still work."""
        return [peer for peer in self._peers if peer.known and not peer.done]

    def awaited(self, ranks_elsewhere: int) -> bool:
        """Whether there is a watcher that has yet to introduce itself; on node 0, as long as it does not know of all ranks."""
        if self.middle:
            return sum(self._met.values()) < ranks_elsewhere
        return any(not peer.known for peer in self._peers)

    def tell(self, **message: Any) -> None:
        """Sends a message to all who have introduced themselves."""
        for peer in self._peers:
            if peer.known:
                peer.send(**message)

    def look(self) -> None:
        """To be called about once a second: heartbeats, and who has been silent for too long."""
        at = time.monotonic()
        slept, self._looked_at = at - self._looked_at, at
        for peer in list(self._peers):
            peer.flush()
            if slept > SUSPECT_S:  # this host was stopped for a while; that was not the others' silence
                peer.heard_at = at
            if not peer.known and at - peer.since > CONNECT_S:
                self._drop(peer)
            elif peer.known and not peer.done and at - peer.heard_at > SILENT_S:
                self._drop(peer)
                self._lost(peer, NOT_ANSWERED.format(at - peer.heard_at))
            elif peer.known and at - peer.since > HEARTBEAT_S * 0.9:
                peer.since = at
                peer.send(event="alive")

    def suspects(self) -> list[tuple[Peer, str]]:
        """Who has missed several heartbeats, and that in words."""
        silent = [(peer, time.monotonic() - peer.heard_at) for peer in self.others()]
        return [(peer, NOT_ANSWERED.format(seconds)) for peer, seconds in silent if seconds > SUSPECT_S]

    def close(self) -> None:
        """Says goodbye, so that nobody takes this end for a death."""
        self.tell(event="bye")
        until = time.monotonic() + LEAVE_S
        while not all([peer.flush() for peer in self._peers]) and time.monotonic() < until:
            time.sleep(0.01)
        for peer in self._peers:
            peer.connection.close()
        if self._listener:
            self._listener.close()
