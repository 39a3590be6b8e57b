"""How a rank ends, and who hears of it: nothing is swallowed, nothing is said twice."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from common.errors import RunError, UsageError, complain, one_line
from common.hints import hint
from common.interrupts import insistent
from common.rank import Rank
from common.reporter import Reporter, supported

# What gloo and the store say when the other side is gone (torch 2.9 to 2.13); such a rank is not the cause.
_PEER_IS_GONE = ("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "timed out waiting",
                 "connectfullmesh", "connection was likely closed", "socket timeout", "remote process exited")  # fmt: skip

_C_SOURCE = r"\[/\S+:\d+\] "  # where in gloo's source it was noticed

# The second is what is left of a Ctrl-C that comes between ``watched`` and the first line within it.
_CTRL_C = (KeyboardInterrupt, GeneratorExit)

_watched: tuple[Rank, Reporter | None] | None = None


def lost_a_peer(error: BaseException) -> bool:
    """Whether ``error`` is what a rank sees when another one died."""
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _PEER_IS_GONE)


def _cause(error: BaseException) -> tuple[str, str]:
    """(event, sentence's end) for the watcher."""
    if isinstance(error, UsageError):
        return "refused", str(error)
    if isinstance(error, _CTRL_C):
        return "interrupted", "was interrupted"
    if isinstance(error, SystemExit):
        return "failed", f"left with exit status {error.code} before its work was done"
    if isinstance(error, RunError):
        return "failed", f"failed: {error}"
    if remedy := hint(error):
        return "failed", f"failed: {remedy} ({one_line(error, 100).rstrip(' .')})"
    if lost_a_peer(error):
        return "lost a peer", f"lost another rank: {re.sub(_C_SOURCE, '', one_line(error))}"
    return "failed", f"failed: {one_line(error)}"


@contextmanager
def watched(rank: Rank, events: Path | None = None) -> Iterator[None]:
    """Puts this rank under its node's watcher, which tells of the first failure and ends the other ranks.

    ``events`` is the rank's file of events, in which the watcher notes when the process has ended.

    Raises:
        SystemExit: 2 after a UsageError, 1 after any other failure, once it has been told of.
        KeyboardInterrupt: as it came.
    """
    global _watched
    reporter = None
    if (rank.world_size > 1 or events) and supported:
        # The last start's watcher may still be there.
        group = f"{rank.master_addr}:{rank.master_port}/{rank.store_prefix}/{rank.node_rank}/{rank.restart}"
        name = group if rank.forms_group else str(events)
        about = {
            "rank": rank.rank,
            "host": socket.gethostname(),
            "parents": rank.launchers,
            "events": events and str(events),
            "launcher_kills": rank.launcher == "mpi",
            "node": rank.node_rank,
            "ranks_here": rank.local_world_size,
            "world_size": rank.world_size,
            "one_terminal": rank.one_terminal,
        }
        reporter = Reporter(name, about)
    _watched = rank, reporter
    try:
        with insistent():
            yield
    except BaseException as error:
        of_many = reporter and rank.world_size > 1
        if of_many and isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C, from the launcher too, changes nothing
        event, cause = _cause(error)
        explained = event != "failed" or isinstance(error, (RunError, SystemExit)) or hint(error)
        trace = "" if explained else "".join(traceback.format_exception(error))
        if not (reporter and reporter.ask(event=event, cause=cause, traceback=trace)):
            if isinstance(error, UsageError):
                raise  # exit_status prints it
            if event != "interrupted":
                complain(f"{trace}{_sentence(rank, cause)}")
        if of_many and (isinstance(error, _CTRL_C) or event == "lost a peer"):
            sys.stdout.flush()  # gloo's threads may ask for the interpreter while it ends, which ends in a crash
            os._exit(1 if event == "lost a peer" else 130)
        if isinstance(error, _CTRL_C):
            raise
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    else:
        if reporter and rank.one_node:
            reporter.tell(event="done")
        elif reporter:  # the other nodes are to know before a launcher clears this one
            reporter.ask(event="done")
    finally:
        _watched = None
        if reporter:
            reporter.close()


def watcher() -> Reporter | None:
    """This rank's line to its watcher; None where there is none."""
    return _watched[1] if _watched else None


def _sentence(rank: Rank, cause: str) -> str:
    return f"Rank {rank.rank} on {socket.gethostname()} (pid {os.getpid()}) {cause}."


def end_now(cause: str) -> NoReturn:
    """Ends this rank with status 1 from another thread than the one that trains, which waits in C code for a silent rank.

    Args:
        cause: the sentence's end: "waited 60 s for …". It is told unless a watcher knows of a rank that failed.
    """
    if _watched:
        rank, reporter = _watched
        if not (reporter and reporter.ask(event="lost a peer", cause=cause)):
            complain(_sentence(rank, cause))
    os._exit(1)
