"""Who this process is: the one value that a launcher hands to the training."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from common import now
from common.errors import UsageError
from common.events import launching_ancestors


def _launchers() -> tuple[int, ...]:
    """``launching_ancestors``, and multiprocessing's parent where it is none of them any more: the watcher sees that it is gone."""
    chain = launching_ancestors()
    process = sys.modules.get("multiprocessing.process")
    parent = process and process.parent_process()
    return (*chain, parent.pid) if parent and parent.pid not in chain else tuple(chain)


@dataclass(frozen=True)
class Rank:
    """One process of a run. The words are those of ``torch/distributed/run.py``.

    Raises:
        UsageError: the numbers cannot belong together.
    """

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    """Host of the store through which ranks find each other; None: a process on its own, no group is formed."""
    master_port: int = 0
    store_is_served: bool = False
    """The launcher already serves a store there (torchrun's agent does); else rank 0 serves it."""
    serves_store: bool | None = None
    """Whether this rank serves the store, where the launcher does not; None: rank 0 does, which is known from here on. Such a rank
    leaves last."""
    store_prefix: str = ""
    """Keeps the keys of one (re)start apart from those of the last one in a store that outlives it."""
    start_method: str | None = None
    """multiprocessing's, where it started this process: spawn, forkserver or fork."""
    cpus: int | None = None
    """How many the launcher has granted this rank where it need not bind it to them (SLURM); None: all that it may run on."""
    restart: int = 0
    """How often the launcher has started the group again after a failure."""
    known_at: float = field(default_factory=now, compare=False)
    """When this process knew who it is, on ``common.now``'s clock."""
    launchers: tuple[int, ...] = field(default_factory=_launchers, compare=False)
    """Process ids of who started this process in order to launch it, nearest first; looked up here, before torch is imported,
    so that a launcher's death in that second is noticed."""

    def __post_init__(self) -> None:
        """Refuses impossible numbers."""
        if self.serves_store is None:
            object.__setattr__(self, "serves_store", self.rank == 0)
        if not 0 <= self.rank < self.world_size:
            raise UsageError(
                f"RANK {self.rank} with WORLD_SIZE {self.world_size}: a rank is 0 to WORLD_SIZE - 1; number the ranks from 0"
            )
        if not 0 <= self.local_rank < self.local_world_size <= self.world_size:
            raise UsageError(
                f"LOCAL_RANK {self.local_rank} with LOCAL_WORLD_SIZE {self.local_world_size} and WORLD_SIZE {self.world_size}: "
                "a local rank is 0 to LOCAL_WORLD_SIZE - 1, which is at most WORLD_SIZE; mend the environment"
            )
        if self.world_size > 1 and not self.master_addr:
            raise UsageError(
                f"WORLD_SIZE {self.world_size} without MASTER_ADDR: ranks need the host of rank 0; set MASTER_ADDR and MASTER_PORT"
            )

    @property
    def title(self) -> str:
        """The launcher, with its start method: ``spawn (forkserver)``."""
        return f"{self.launcher} ({self.start_method})" if self.start_method else self.launcher

    @property
    def forms_group(self) -> bool:
        """Whether a process group is joined (a launcher's single rank joins one too)."""
        return self.master_addr is not None

    @property
    def one_node(self) -> bool:
        """Whether all ranks are on this node."""
        return self.local_world_size == self.world_size


def rank_number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The whole number that variable ``name`` holds.

    Raises:
        UsageError: it is not set and has no default, or is no whole number.
    """
    text = environment.get(name)
    if not text:
        if default is None:
            started = ", ".join(n for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if environment.get(n)) or "nothing else"
            raise UsageError(f"{name} is not set, but {started} is: set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT together")
        return default
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"{name}={text}: not allowed; give a whole number, 0 or more")
    return int(text)


def on_this_machine(host: str | None) -> bool:
    """Whether ``host`` is a loopback name or address, so that all ranks that meet there share this machine."""
    return host is not None and (host == "localhost" or host == "::1" or host.startswith("127."))
