"""A run's phases as a trace for ui.perfetto.dev and chrome://tracing.

The format: "Trace Event Format", JSON object form, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness.phases import LABELS, PhaseRow, durations, timelines

_COMMAND = 0  # the thread that stands for the launcher's command; rank R is thread R + 1


def chrome_trace(rows: Sequence[PhaseRow], about: dict[str, Any]) -> dict[str, Any]:
    """One process a launcher, in it one thread for its command and one a rank; the median run of each, all from time 0.

    Args:
        rows: what was measured; a launcher without a good run is left out.
        about: machine, versions, commit, to be kept with the trace.
    """
    events: list[dict[str, Any]] = []
    for pid, row in enumerate((r for r in rows if r.shown), 1):
        sample = row.shown
        assert sample
        events += [_named("process_name", pid, _COMMAND, {"name": row.case.name})]
        events += [_named("process_sort_index", pid, _COMMAND, {"sort_index": pid})]
        events += _thread(pid, _COMMAND, "command")
        events.append(_complete(pid, _COMMAND, sample.command, "command", 0.0, sample.wall_seconds, {}))
        for rank in timelines(sample):
            tid = rank["rank"] + 1
            events += _thread(pid, tid, f"rank {rank['rank']}")
            about_rank = {name: rank[name] for name in ("host", "pid", "threads", "clock_offset_seconds") if name in rank}
            at = 0.0
            for name, seconds in durations(rank["seconds"]).items():
                events.append(_complete(pid, tid, LABELS[name], "phase", at, seconds, {"until": name} | about_rank))
                at += seconds
            if (first := rank["seconds"].get("first_step_done")) is not None:
                mark = {"name": "first step done", "cat": "mark", "ph": "i", "s": "t", "ts": _us(first), "pid": pid, "tid": tid}
                events.append(mark)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def _complete(pid: int, tid: int, name: str, category: str, start: float, seconds: float, args: dict[str, Any]) -> dict[str, Any]:
    where = {"ts": _us(start), "dur": _us(seconds), "pid": pid, "tid": tid}
    return {"name": name, "cat": category, "ph": "X", **where, "args": args}


def _thread(pid: int, tid: int, name: str) -> list[dict[str, Any]]:
    return [_named("thread_name", pid, tid, {"name": name}), _named("thread_sort_index", pid, tid, {"sort_index": tid})]


def _named(what: str, pid: int, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": what, "ph": "M", "ts": 0, "pid": pid, "tid": tid, "args": args}
