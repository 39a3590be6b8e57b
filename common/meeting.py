"""Where ranks meet: the store, who is still missing, and the link between the watchers of several nodes."""

from __future__ import annotations

import errno
import json
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from common.endings import watcher
from common.errors import RunError, UsageError, complain, one_line
from common.interfaces import leads_back, own_address
from common.ports import port_taken
from common.rank import Rank

T = TypeVar("T")
SPEAK_S = (3.0, 15.0)  # until it is said who is waited for: nodes are often started by hand; ranks of one node start together
AGAIN_S = 30.0
OWN_NAME_S = 3.0  # that a container's network may take to know a name
TRY_S = 5.0  # to connect to rank 0: three attempts of TCP's, whatever becomes of them
_MOST_NAMED = 16


class Waiting:
    """Says for whom this rank waits, once it has waited for some seconds, and now and then again."""

    def __init__(self, rank: Rank, patience: float) -> None:
        """The wait begins.

        Args:
            rank: who waits; of the ranks of a node the first one speaks.
            patience: seconds that it may last.
        """
        self.rank, self.patience = rank, patience
        self.next = time.monotonic() + SPEAK_S[rank.one_node]

    def __call__(self, whom: Callable[[], str]) -> None:
        """To be called often; ``whom`` is asked only when it is time to speak."""
        if self.rank.local_rank == 0 and time.monotonic() > self.next:
            self.next = time.monotonic() + AGAIN_S
            who = f"Rank {self.rank.rank} on {socket.gethostname()}"
            complain(f"{who} waits for {whom()} (up to {self.patience:g} s, --timeout)")


def listed(ranks: list[int]) -> str:
    """``rank 1`` or ``ranks 1, 2, 3``; of many the first."""
    more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:_MOST_NAMED]))}{more}"


@dataclass(frozen=True)
class Meeting:
    """What ranks tell each other through the store: it works before there is a group, and under any backend."""

    store: dist.Store
    rank: Rank
    patience: float
    """Seconds to wait for a rank."""
    link: WatcherLink = field(init=False)
    """Of this node's watcher with the others'."""

    def __post_init__(self) -> None:
        """No link yet."""
        object.__setattr__(self, "link", WatcherLink(self.store, self.rank))

    def tell(self, what: str, value: Any) -> None:
        """Writes this rank's ``value`` (fit for JSON) under ``what``; read by the others with ``hear``."""
        self.store.set(f"{what}/{self.rank.rank}", json.dumps(value))
        self.store.set(f"{what}/told/{self.store.add(f'{what}/told', 1)}", "")

    def hear(
        self,
        what: str,
        absent: str,
        hint: str = "",
        until: float | None = None,
        meanwhile: Callable[[Callable[[], str]], None] = lambda missing: None,
    ) -> list[Any]:
        """What every rank has told under ``what``, in rank order, once all have.

        Args:
            what: the name that they told it under.
            absent: what a missing rank failed to do, in words: "did not arrive".
            hint: the end of that sentence.
            until: on the clock of ``time.monotonic``; by default ``patience`` from now.
            meanwhile: called again and again, with what tells which ranks are missing.

        Raises:
            RunError: ranks are missing when the time is up; they are named.
        """
        until = time.monotonic() + self.patience if until is None else until
        keys = [f"{what}/{r}" for r in range(self.rank.world_size)]
        last = f"{what}/told/{len(keys)}"  # asked for often, so one key only; the store's own wait() is deaf to Ctrl-C

        def missing() -> str:
            return listed([r for r, key in enumerate(keys) if not self.store.check([key])])

        while not (self.store.check([last]) and self.store.check(keys)):
            if time.monotonic() > until:
                raise RunError(f"{missing()} of {len(keys)} {absent} within {self.patience:g} s (--timeout){hint}")
            meanwhile(missing)
            time.sleep(0.0005 * (1 + len(keys)))  # as many questions a second, however many ask
        return [json.loads(value) for value in self.store.multi_get(keys)]


def once_per_node(meeting: Meeting | None, make: Callable[[], T]) -> T:
    """``make()`` on the node's first rank, then on its others, which find what that has left.

    Raises:
        UsageError: it was refused on a rank; the others of its node get the same.
    """
    if meeting is None:
        return make()
    rank = meeting.rank
    meeting.link.seek_before_work(meeting.patience)
    return _after_the_first(meeting.store, f"made/{rank.node_rank}", rank.local_rank == 0, make)


def check_alike(meeting: Meeting | None, facts: Mapping[str, Any], remedy: str) -> None:
    """Compares what every rank has found, once all have.

    However long it takes: ``patience`` is for ranks that do nothing. If a rank dies the watcher ends the others.

    Args:
        meeting: None: there are no others.
        facts: name → a value fit for JSON.
        remedy: the end of the sentence where they differ.

    Raises:
        UsageError: they differ (on all ranks).
    """
    if meeting is None:
        return
    meeting.tell("found", dict(facts))
    first, *others = meeting.hear("found", "", until=float("inf"))
    for number, other in enumerate(others, 1):
        for name, value in other.items():
            if value != first[name]:
                raise UsageError(f"rank {number} has {name} {value} where rank 0 has {first[name]}; {remedy}")


def by_rank_0(meeting: Meeting | None, do: Callable[[], None]) -> None:
    """``do()`` on rank 0; the others wait for it.

    Raises:
        UsageError: it was refused there; all ranks get the same.
    """
    if meeting is None:
        return do()
    first = meeting.rank.rank == 0
    return _after_the_first(meeting.store, "done", first, do if first else lambda: None)


def _after_the_first(store: dist.Store, key: str, first: bool, make: Callable[[], T]) -> T:
    """``make()``: at once on the ``first`` of some ranks; on the others then, unless it was refused."""
    if not first:
        while not store.check([key]):  # the store's own wait() is deaf to Ctrl-C
            time.sleep(0.02)
        if refusal := json.loads(store.get(key)):
            raise UsageError(refusal)
        return make()
    refusal = None
    try:
        return make()
    except UsageError as error:
        refusal = str(error)
        raise
    finally:
        store.set(key, json.dumps(refusal))


class WatcherLink:
    """Brings this node's watcher together with those of other nodes: a failure on one is then told on all."""

    KEY = "watcher"

    def __init__(self, store: dist.Store, rank: Rank) -> None:
        """``store``: where the address of node 0's watcher is found."""
        self.store, self.rank = store, rank
        self.reporter = watcher()
        self.wanted = bool(self.reporter) and not rank.one_node and rank.local_rank == 0

    def offer(self) -> None:
        """Has rank 0's watcher listen, and tells where; nothing on other ranks."""
        if self.wanted and self.reporter and self.rank.rank == 0:
            self.wanted = False
            if offer := self.reporter.ask(event="listen"):
                self.store.set(self.KEY, json.dumps(offer | {"address": own_address(self.rank.master_addr or "")}))

    def seek(self) -> None:
        """Has this node's watcher connect to rank 0's as soon as that listens; to be called again and again."""
        if self.wanted and self.reporter and self.store.check([self.KEY]):
            self.wanted = False
            offer = json.loads(self.store.get(self.KEY))
            # Where an agent serves the store, rank 0 may be on another host; where it does itself, that name leads to it.
            addresses = {offer["address"]: None} | dict.fromkeys(_numbers(self.rank.master_addr or ""))
            there = sorted(filter(None, addresses), key=lambda address: address.startswith("127."))
            self.reporter.tell(event="connect", addresses=there, port=offer["port"], token=offer["token"])

    def seek_before_work(self, patience: float) -> None:
        """Waits for rank 0, ``patience`` seconds at most, to seek it: who then works for minutes hears of failures elsewhere."""
        until = time.monotonic() + patience
        while self.wanted and not self.store.check(["here/0"]) and time.monotonic() < until:
            time.sleep(0.02)
        self.seek()


def _numbers(host: str) -> list[str]:
    with suppress(OSError):
        return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    return []


def _wait_for_listener(rank: Rank, until: float, timeout: float) -> None:
    """Returns once the store's address answers: our own probe, because the store's is long-winded when it fails."""
    assert rank.master_addr
    where = f"{rank.master_addr}:{rank.master_port}"
    reason, refused = "no answer", False
    waiting = Waiting(rank, timeout)
    while True:
        try:
            limit = min(TRY_S, max(0.1, until - time.monotonic()))
            socket.create_connection((rank.master_addr, rank.master_port), timeout=limit).close()
            return
        except OSError as error:
            reason, refused = error.strerror or str(error), error.errno == errno.ECONNREFUSED
            if rank.store_is_served and rank.node_rank and leads_back(rank.master_addr):
                raise RunError(
                    f"MASTER_ADDR {rank.master_addr} is node {rank.node_rank} itself ({reason}), and rank 0 is on another: that is "
                    "what node 0 calls itself; start its torchrun with --local-addr and the address by which the others reach it"
                ) from None
        if time.monotonic() > until:
            raise RunError(
                f"rank {rank.rank} waited {timeout:g} s (--timeout) for rank 0 at {where}: {reason}; "
                "is rank 0 started, and is this its address and port?"
                + ("" if refused else " If so, a firewall may be in between: python -m common.doctor --hosts hosts.txt")
            )
        waiting(lambda: f"rank 0 at {where}" + ("" if refused else f": {reason}"))  # noqa: B023  called at once
        time.sleep(0.02)


def _lost_itself(rank: Rank, why: str) -> str:
    return (
        f"rank 0 does not reach itself at {rank.master_addr}:{rank.master_port} ({why}): MASTER_ADDR is to be this host's address, "
        "as the others see it; containers need a network that gives names (docker run --network NAME --name ...), or --network host"
    )


def _check_own_name(rank: Rank, patience: float) -> None:
    """Raises RunError where rank 0's MASTER_ADDR is no name here: the store would say so at length."""
    until = time.monotonic() + min(patience, OWN_NAME_S)
    while True:
        try:
            socket.getaddrinfo(rank.master_addr, rank.master_port)
            return
        except OSError as error:
            if time.monotonic() > until:
                raise RunError(_lost_itself(rank, error.strerror or str(error))) from None
        time.sleep(0.1)


def open_store(rank: Rank, until: float, patience: float) -> dist.Store:
    """The store of ``rank``'s group, its keys apart from those of other starts; rank 0 serves it, unless an agent does.

    Args:
        rank: this process.
        until: when to give up (``time.monotonic``).
        patience: how many seconds that is, for the message.

    Raises:
        RunError: nobody serves it in time.
        UsageError: the port is taken.
    """
    serve = bool(rank.serves_store) and not rank.store_is_served
    if serve:
        _check_own_name(rank, patience)
    else:
        _wait_for_listener(rank, until, patience)
    try:
        store: dist.Store = dist.TCPStore(
            rank.master_addr or "",
            rank.master_port,
            is_master=serve,
            wait_for_workers=False,
            timeout=timedelta(seconds=patience),
        )
    except dist.DistNetworkError as error:
        if serve and "EADDRINUSE" in str(error):
            raise port_taken(rank.master_port, "address already in use", or_free=rank.launcher != "slurm") from None
        if serve:  # it listens, and does not get there
            raise RunError(_lost_itself(rank, one_line(error, 120))) from None
        raise
    return dist.PrefixStore(f"launchlab/{rank.store_prefix}", store)
