"""Two processes that take themselves for the same rank, or for ranks of worlds of different sizes: all hear of it at once.

They come of a --node_rank or RANK given twice, and of another --nproc_per_node on one node. Nothing but the time limit would end
the waiting for ranks that nobody is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, Protocol

from common.errors import UsageError
from common.rank import Rank

_HEARD_S = 0.5  # those that wait ask every few milliseconds


class Store(Protocol):
    """What ``torch.distributed.Store`` offers, as far as it is needed here."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Sets ``key`` if it holds ``expected`` ("": nothing), and returns what it holds then."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether all are set."""
        ...

    def set(self, key: str, value: str) -> None:
        """Sets one."""
        ...


def claim(store: Store, rank: Rank, here: Mapping[str, Any]) -> None:
    """Takes this rank's place, before it is told that it is there (``Meeting.tell("here", …)``).

    Raises:
        UsageError: the place is taken, or was made for another world. ``check_claims`` raises it in those that wait.
    """
    if rank.store_is_served:  # an agent has numbered the ranks, and its store may know those of an earlier start
        return
    mine = {"rank": rank.rank, "host": here["host"], "pid": here["pid"], "world": rank.world_size}
    first = json.loads(store.compare_set("claim/world", "", json.dumps(mine)))
    clash = ""
    if first["world"] != rank.world_size:
        clash = (
            f"rank {rank.rank} on {mine['host']} was told of {rank.world_size} ranks in all, rank {first['rank']} on "
            f"{first['host']} of {first['world']}: give all nodes the same --nnodes and --nproc_per_node (hand-started ranks: the "
            "same WORLD_SIZE)"
        )
    else:
        other = json.loads(store.compare_set(f"claim/{rank.rank}", "", json.dumps(mine)))
        if other != mine:
            clash = (
                f"rank {rank.rank} is there twice, on {other['host']} (pid {other['pid']}) and on {mine['host']} (pid "
                f"{mine['pid']}): give each node a --node_rank of its own (hand-started ranks: each its own RANK)"
            )
    if not clash:
        return
    if not store.check([last := f"here/told/{first['world']}"]):  # else the first ones are complete, and train
        absent = [f"here/{r}" for r in range(1, first["world"]) if not store.check([f"here/{r}"])]
        for key in ["here/0", *absent, last]:
            store.set(key, json.dumps({"clash": clash}))
        if rank.rank == 0:  # which serves the store
            time.sleep(_HEARD_S)
    raise UsageError(clash)


def check_claims(arrivals: list[dict[str, Any]]) -> None:
    """Raises what ``claim`` has raised in another rank."""
    for arrival in arrivals:
        if "clash" in arrival:
            raise UsageError(arrival["clash"])
