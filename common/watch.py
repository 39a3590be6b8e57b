"""One small process per node that sees to it that a run ends: who failed first and how, end the rest, leave.

Launchers differ in what they do when a rank dies: MPICH prints a process id, a Python exception under mpi4py waits in
MPI_Finalize, a shell waits for all. So each rank of a node reports to a watcher that stands apart from the launcher (in a session
of its own) and holds a pidfd (pidfd_open(2)) of each rank. The first rank to arrive binds the node's abstract Unix socket
(unix(7)) and starts the watcher on it (``common.reporter``); the others find the name taken and connect.

Over several nodes the watchers tell each other (``common.watch_link``): each decides at once about what cannot have been caused
elsewhere, and node 0's about the rest.

Linux only. Elsewhere each rank prints its own failure, and ending the others is left to the launcher.

This file is the watcher's program (``python -I -S watch.py FD``) and imports the standard library only, as do those that it
imports: it is up in about 20 ms.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
import time
from typing import Any

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common.watch_link import Links, Peer
from common.watched_process import WITHOUT_A_WORD, Member, how_it_ended

START_S = 30.0  # for the rank that started us to connect, if it lives
SETTLE_S = 0.3  # a dead rank's peers often report a broken connection before the kernel reports the death
SETTLE_NODES_S = 0.6  # and before that has come here over the network
TERM_S = 0.5  # then SIGTERM to whoever has not left
KILL_S = 2.5  # then SIGKILL
LINK_S = 3.0  # then for a link with another node that has yet to hear of a failure
LEAVE_S = 4.5  # and to those that told of their own end, and are leaving or wait in MPI_Finalize: below the promised 5

# How far from the cause. Nothing is nearer than a death or a failure of one's own; what a launcher or a person did, or a node's
# silence, may itself have a cause that is still on its way here; and who lost a peer is never the cause.
_DISTANCE = {"failed": 0, "refused": 0, "died": 0, "orphaned": 0, "interrupted": 1, "node lost": 1, "lost a peer": 2}

Failure = dict[str, Any]  # event, distance, cause, traceback, who, rank, pid, by (the node that tells): fit for JSON


class _Watcher:
    """Waits for the first failure among the ranks that connect, tells of it, and ends the others."""

    def __init__(self, listener: socket.socket) -> None:
        self.selector = selectors.DefaultSelector()
        self.listener = listener
        listener.setblocking(False)
        self.selector.register(listener, selectors.EVENT_READ, self._welcome)
        self.links = Links(self.selector, self._introduce, self._heard_from, self._lost)
        self.members: list[Member] = []
        self.failures: list[tuple[Failure, Member | None]] = []
        self.verdict: Failure | None = None  # node 0's, or what was told
        self.failed_at: float | None = None
        self.told = False
        self.steps = [(SETTLE_S + TERM_S, signal.SIGTERM, False), (KILL_S, signal.SIGKILL, False), (LEAVE_S, signal.SIGKILL, True)]
        self.waiting: list[Member] = []
        self.parents: set[int] = set()
        self.orphaned = False
        self.patience = time.monotonic() + START_S
        try:  # who began to listen: the rank that started us
            starter = os.pidfd_open(struct.unpack("3i", listener.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
            self.selector.register(starter, selectors.EVENT_READ, lambda: self._starter_ended(starter))
        except OSError:
            self.patience = time.monotonic() + 1

    def _starter_ended(self, fd: int) -> None:
        self.selector.unregister(fd)
        self.patience = time.monotonic() + 1  # others may be about to connect

    def run(self) -> None:
        """Until every rank that came has left."""
        while (
            any(m.alive for m in self.members)
            or (not self.members and time.monotonic() < self.patience)
            or (self.failures and not self.told)
        ):
            for key, _ in self.selector.select(0.05 if self.failed_at else 1.0):
                key.data()
            if self.orphaned:
                self._launcher_is_gone()
            self.links.look()
            self._act()
        self._wait_for_late_comers()
        self.links.close()

    def _wait_for_late_comers(self) -> None:
        """Until every node knows of this failure: one that came right after the start may have been quicker than the links."""
        for end in (self.listener, *(member.connection for member in self.members)):
            if end in self.selector.get_map():
                self.selector.unregister(end)
            end.close()  # the name is free for the next run
        until = time.monotonic() + LINK_S
        elsewhere = max((m.about.get("world_size", 0) - m.about.get("ranks_here", 0) for m in self.members), default=0)
        while self.failures and self.links.awaited(elsewhere) and time.monotonic() < until:
            for key, _ in self.selector.select(0.05):
                key.data()
            self.links.look()

    # ------------------------------------------------------------------------------------------------- this node's ranks

    def _welcome(self) -> None:
        """Lets in all who wait: with the first of them gone already, nobody may stay outside."""
        with contextlib.suppress(BlockingIOError):
            while True:
                member = Member(self.listener.accept()[0])
                self.members.append(member)
                self.selector.register(member.connection, selectors.EVENT_READ, lambda member=member: self._read(member))
                if member.alive:
                    self.selector.register(member.pidfd, selectors.EVENT_READ, lambda member=member: self._ended(member))
                else:
                    self._read(member)
                    if not member.finished:
                        self._fail("died", WITHOUT_A_WORD, member)

    def _read(self, member: Member) -> None:
        if not member.connected:  # its end came first
            return
        for message in member.read():
            self._heard(member, message)
        if not member.connected:
            self.selector.unregister(member.connection)

    def _heard(self, member: Member, message: dict[str, Any]) -> None:
        event = message["event"]
        if event == "here":
            member.about = message
            self.links.tell(event="here", **self._introduce())
            for parent in set(message.get("parents", [])) - self.parents:
                self.parents.add(parent)
                try:
                    fd = os.pidfd_open(parent)
                    self.selector.register(fd, selectors.EVENT_READ, lambda fd=fd: self._parent_ended(fd))
                except ProcessLookupError:
                    self.orphaned = True
        elif event == "listen":
            member.answer(**self.links.listen())
        elif event == "connect":
            self.links.connect(message["addresses"], message["port"], message["token"])
        elif event == "who is linked":
            member.answer(nodes=[peer.name for peer in self.links.others()])
        elif event == "done":
            member.finished = True
            if all(m.finished for m in self.members) and len(self.members) >= member.about.get("ranks_here", 1):
                self.links.tell(event="done")  # before anyone leaves, and perhaps takes us along
            if message.get("answer"):
                member.answer(heard=True)
        else:
            member.finished = True
            self.waiting.append(member)
            self._fail(event, message["cause"], member, message.get("traceback", ""))

    def _ended(self, member: Member) -> None:
        if member.connected:
            self._read(member)  # its last words may be waiting
        member.alive = False
        self.selector.unregister(member.pidfd)
        if path := member.about.get("events"):
            line = json.dumps({"phase": "process_ended", "time": time.clock_gettime(time.CLOCK_BOOTTIME)})
            with contextlib.suppress(OSError):
                file = os.open(path, os.O_WRONLY | os.O_APPEND)
                os.write(file, line.encode() + b"\n")
                os.close(file)
        if not member.finished:
            cause = how_it_ended(member.pidfd, member.pid)
            # A launcher may have been quicker than we to ask the others to leave, and mpirun, to make them.
            perhaps_theirs = ("SIGTERM", "SIGKILL") if member.about.get("launcher_kills") else ("SIGTERM",)
            self._fail("died", cause, member, distance=int(cause.endswith(perhaps_theirs)))

    def _parent_ended(self, fd: int) -> None:
        self.selector.unregister(fd)
        self.orphaned = True

    def _launcher_is_gone(self) -> None:
        self.orphaned = False
        for member in self.members:
            self._read(member)  # a rank that said that it is done before that needs no launcher
        if any(m.alive and not m.finished for m in self.members):
            self._fail("orphaned", "the launcher that started this node's ranks is gone", None)

    def _fail(self, event: str, cause: str, member: Member | None, traceback: str = "", distance: int | None = None) -> None:
        if self.told:  # it is our own doing
            self._release()
            return
        about = member.about if member else {}
        failure = {
            "event": event,
            "distance": _DISTANCE[event] if distance is None else distance,
            "cause": cause,
            "traceback": traceback,
            "who": f"Rank {about.get('rank')} on {about.get('host')} (pid {member.pid})" if member else f"Watch on {self._host()}:",
            "by": self._node(),
            "rank": about.get("rank"),
            "pid": member.pid if member else None,
        }
        self._note(failure, member)
        if not self.links.middle:
            self.links.tell(**failure | {"event": "failure", "what": event})

    # ------------------------------------------------------------------------------------------------------ other nodes

    def _host(self) -> str:
        return next((m.about["host"] for m in self.members if "host" in m.about), socket.gethostname())

    def _node(self) -> int:
        return next((m.about["node"] for m in self.members if "node" in m.about), 0)

    def _introduce(self) -> dict[str, Any]:
        return {"node": self._node(), "host": self._host(), "ranks": [m.about["rank"] for m in self.members if "rank" in m.about]}

    def _heard_from(self, peer: Peer, message: dict[str, Any]) -> None:
        if message["event"] == "hello" and self.links.middle and self.verdict:  # too late to live
            self._send_verdict([peer])
        elif message["event"] == "hello" and not self.links.middle:  # what went wrong here before there was somebody to tell
            for failure, _ in self.failures:
                peer.send(**failure | {"event": "failure", "what": failure["event"]})
        elif message["event"] == "failure" and not self.told:
            failure = message | {"event": message["what"]}
            self._note(failure, None)
            if not self.links.middle:
                self.verdict = failure

    def _lost(self, peer: Peer, cause: str) -> None:
        self._note(self._node_lost(peer, cause), None)

    def _node_lost(self, peer: Peer, cause: str) -> Failure:
        failure = {"event": "node lost", "distance": 1, "cause": cause, "traceback": "", "who": peer.name}
        return failure | {"by": self._node(), "rank": None, "pid": None}

    def _send_verdict(self, peers: list[Peer]) -> None:
        assert self.verdict
        for peer in peers:
            peer.send(**self.verdict | {"event": "failure", "what": self.verdict["event"]})

    # ---------------------------------------------------------------------------------------------- telling and ending

    def _note(self, failure: Failure, member: Member | None) -> None:
        self.failures.append((failure, member))
        self.failed_at = self.failed_at or time.monotonic()

    def _act(self) -> None:
        if self.failed_at is None:
            return
        elapsed = time.monotonic() - self.failed_at
        if not self.told and self._settled(elapsed):
            self._tell()
        while self.told and self.steps and elapsed > self.steps[0][0]:
            _, number, also_leaving = self.steps.pop(0)
            for member in self.members:
                if also_leaving or not member.finished:
                    member.kill(number)

    def _settled(self, elapsed: float) -> bool:
        """Whether nothing nearer to the cause will come; a launcher may stop listening soon, so no longer than needed."""
        if self.verdict or any(failure["distance"] == 0 for failure, _ in self.failures):
            return True
        if not self.links.others():
            return elapsed > SETTLE_S or not any(m.alive and not m.finished for m in self.members)
        if all(failure["event"] == "interrupted" for failure, _ in self.failures):
            return elapsed > SETTLE_S
        return elapsed > (SETTLE_NODES_S if self.links.middle else 2 * SETTLE_NODES_S)

    def _tell(self) -> None:
        """One sentence about the failure nearest to the cause, earliest first; then the failed ranks may go."""
        self.told = True
        failure, member = self._nearest()
        self.verdict = failure
        with contextlib.suppress(OSError):
            os.write(2, self._text(failure, member).encode(errors="replace"))
        if self.links.middle:
            self._send_verdict(self.links.others())
        for other in self.members:  # those that only wait for others have nothing to add
            if other is not member and not other.finished and failure["event"] != "refused":
                other.kill(signal.SIGTERM)
        self._release()

    def _release(self) -> None:
        for member in self.waiting:
            member.answer(heard=True)
        self.waiting.clear()

    def _nearest(self) -> tuple[Failure, Member | None]:
        if told := self.verdict:  # perhaps about a rank of ours
            return told, next((m for f, m in self.failures if m and (f["by"], f["pid"]) == (told["by"], told["pid"])), None)
        failure, member = min(self.failures, key=lambda each: each[0]["distance"])
        if failure["event"] == "lost a peer":
            if suspects := self.links.suspects():
                return self._node_lost(*suspects[0]), None
            if "timed out" in failure["cause"].lower() and (silent := self._silent()):
                verb = "has" if len(silent) == 1 else "have"
                why = f"{', '.join(silent)} {verb} said nothing (hanging, stopped, or still computing)"
                failure = failure | {"cause": f"{failure['cause']}; {why}"}
        return failure, member

    def _silent(self) -> list[str]:
        """Who has not reported a time-out too; nobody, where that is most of them."""
        heard = {failure["rank"] for failure, _ in self.failures}
        ranks: dict[int, str] = {
            m.about["rank"]: self._host() for m in self.members if "rank" in m.about and m.alive and not m.finished
        }
        ranks |= {rank: peer.about["host"] for peer in self.links.others() for rank in peer.about["ranks"]}
        silent = sorted(set(ranks) - heard)
        return [f"rank {rank} on {ranks[rank]}" for rank in silent] if len(silent) <= max(1, len(heard)) else []

    def _text(self, failure: Failure, member: Member | None) -> str:
        """What is printed here. Where all nodes share a terminal, only the first who knows speaks, of a refusal node 0."""
        ours, event = failure["by"] == self._node(), failure["event"]
        shared = any(m.about.get("one_terminal") for m in self.members)
        if event == "refused":
            speaks = self.links.middle or not self.links.others() or not shared
            who = "" if ours or shared else f"{failure['who']}: "
            return f"{who}error: {failure['cause']}\n" if speaks else ""
        if event == "interrupted" and (ours or any(f["event"] == event and m for f, m in self.failures)) or shared and not ours:
            return ""
        number = sum(1 for m in self.members if m is not member and m.alive)
        which = f"{'other ' if ours and event != 'node lost' else ''}{number} rank{'s' * (number != 1)}"
        who = "Watch:" if ours and event == "orphaned" else failure["who"]
        text = failure["traceback"] if ours or self.links.middle else ""
        return f"{text}{who} {failure['cause']}" + (f"; ending the {which} here.\n" if number else ".\n")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    _Watcher(socket.socket(fileno=int(sys.argv[1]))).run()
