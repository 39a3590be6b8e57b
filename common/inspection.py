"""``--inspect``: who the ranks are, what their launcher gave them, and whether they reach each other. Nothing is trained."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common.collectives import Check, check_collectives
from common.config import TrainConfig
from common.console import Console, table
from common.device import choose_device
from common.errors import RunError
from common.files import write_json
from common.process_group import Group, announce, process_group, refused_together
from common.rank import Rank

SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL")
HIDDEN = "(hidden: its name looks like a secret's)"
OF_SRUN = ("SLURM", "SRUN_", "PMI", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")  # how the names begin that it sets
VALUE_WIDTH = 80  # characters of a value that the screen shows
VALUES_SHOWN = 8  # different values of one variable that the screen shows


def inspect(config: TrainConfig, rank: Rank) -> None:
    """Tells who all ranks are, then has them talk to each other; rank 0 prints it, and writes it with ``--result``.

    Raises:
        RunError: a rank did not arrive, or a collective gave a wrong result.
        UsageError: what was asked for does not fit this machine, or the ranks were given different flags.
    """
    environment, threads = dict(os.environ), torch.get_num_threads()  # before anything here changes them
    console = Console(config, rank)
    arrival = announce(rank, config)
    with refused_together(arrival):
        device = choose_device(config, rank)
    ranks: list[dict[str, Any]] = []

    def arrived(group: Group) -> None:
        console.arrived(group)
        mine = describe(group, config, environment, threads)
        ranks.extend(_exchange(group, "ranks", mine))
        if rank.rank == 0:
            # One process prints for all: launchers pass on the output of several in whatever order it reaches them.
            # It does so before they join: who is where is most wanted when the network between them fails.
            console.line(screen(ranks), prefix="")
        _exchange(group, "ranks shown", None)  # a rank that fails earlier would have rank 0 ended with it

    with process_group(arrival, device, arrived) as group:
        told = _exchange(group, "checked", check_collectives(group) if group.meeting else [])
        checks = [Check.of_all(parts) for parts in zip(*told, strict=True)]
        if rank.rank == 0:
            console.line(talk(checks, group.backend, rank.world_size), prefix="")
            if config.result:
                write_json(config.result, _result(rank, group, ranks, checks))
        _exchange(group, "checks shown", None)
        if group.meeting:
            group.meeting.tell("inspect/left", None)
            if rank.serves_store:  # it leaves last
                group.meeting.hear("inspect/left", "did not end the inspection")
    if wrong := [check.sentence() for check in checks if check.wrong]:
        raise RunError("; ".join(wrong))


def _exchange(group: Group, what: str, mine: Any) -> list[Any]:
    """``mine`` of every rank, in rank order, through the store: what is under test carries no results."""
    if not group.meeting:
        return [mine]
    group.meeting.tell(f"inspect/{what}", mine)
    return group.meeting.hear(f"inspect/{what}", "did not answer")


# ------------------------------------------------------------------------------------------------- what a rank is


def describe(group: Group, config: TrainConfig, environment: Mapping[str, str], threads: int) -> dict[str, Any]:
    """This rank, fit for JSON.

    Args:
        group: the ranks that have arrived.
        config: the run.
        environment: this rank's, as it found it.
        threads: torch's CPU threads, as it found them.
    """
    rank = group.rank
    variables, why = set_by_launcher(rank.launchers, environment)
    return {
        "rank": rank.rank,
        "local_rank": rank.local_rank,
        "world_size": rank.world_size,
        "node_rank": rank.node_rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "master": f"{rank.master_addr}:{rank.master_port}" if rank.forms_group else None,
        "device": str(group.device),
        "threads_found": threads,
        "omp_num_threads": environment.get("OMP_NUM_THREADS"),
        "threads_in_training": group.threads(config, threads),
        "cores": group.arrivals[rank.rank]["cores"],
        "launched": bool(rank.launchers),
        "variables": variables,
        "variables_unknown": why,
    }


def set_by_launcher(launchers: Sequence[int], environment: Mapping[str, str]) -> tuple[dict[str, str] | None, str | None]:
    """(the variables that this rank's launcher set, None) or (None, why they are unknown): measured, no list of names.

    What counts is the environment that the command's first process was started with, against ``environment``. (Not this
    process's own /proc/self/environ: a rank forked from a warm server gets its variables after that one's start.) A program
    that replaces itself by another, as Open MPI 5's mpirun does by prterun, counts with what it handed to that one.
    """
    if not launchers:
        return ({}, None) if Path("/proc/self/environ").exists() else (None, "this system has no /proc")
    by_name: dict[str, str] = {}
    if _is_of_slurm(launchers[-1]):  # srun may be on another host, and slurmstepd's own environment is another one
        launchers = launchers[:-1]
        by_name = {name: value for name, value in environment.items() if name.startswith(OF_SRUN)}
        if not launchers:
            return without_secrets(by_name), None
    path = Path(f"/proc/{launchers[-1]}/environ")  # the outermost: the command itself
    try:
        before = parse_environment(path.read_bytes())
    except OSError as error:
        return None, f"{path}: {error.strerror}"
    if not before:
        return None, f"{path} is empty"  # so it is of a process that has just ended
    return without_secrets(by_name | changed(before, environment)), None


def _is_of_slurm(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == "slurmstepd"
    except OSError:
        return False


def parse_environment(block: bytes) -> dict[str, str]:
    """The variables of a process as /proc/PID/environ holds them: NAME=value, each ended by a zero byte (proc(5))."""
    variables: dict[str, str] = {}
    for entry in block.split(b"\0"):
        name, equals, value = os.fsdecode(entry).partition("=")
        if equals:
            variables.setdefault(name, value)  # of a name that is there twice the first counts, as for os.environ
    return variables


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """The variables of ``now`` that ``before`` lacks or has with another value, by name."""
    differ = {name: value for name, value in sorted(now.items()) if before.get(name) != value}
    if "LC_CTYPE" not in before and differ.get("LC_CTYPE") in ("C.UTF-8", "C.utf8", "UTF-8"):
        del differ["LC_CTYPE"]  # Python sets it for itself where no language is set (PEP 538)
    return differ


def without_secrets(variables: Mapping[str, str]) -> dict[str, str]:
    """``variables`` with the values hidden whose names look like a secret's."""
    return {name: HIDDEN if any(word in name.upper() for word in SECRET) else value for name, value in variables.items()}


# --------------------------------------------------------------------------------------------- what a person sees


def compact(numbers: Collection[int]) -> str:
    """Whole numbers as ranges: {0, 1, 4} is "0-1,4"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def shortened(value: str, width: int = VALUE_WIDTH) -> str:
    """``value`` on one line of at most ``width`` characters, its middle left out: paths of several ranks differ at the end.

    What cannot be printed is written as an escape.
    """
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in value)
    end = width // 2
    return text if len(text) <= width else f"{text[: width - 1 - end]}…{text[-end:]}"


def by_rank(values: Mapping[int, str | None]) -> str:
    """One variable's value on each rank (None: not set there), in as few lines as tell it."""
    if len(set(values.values())) == 1:
        return shortened(next(iter(values.values())) or "")
    if all(value == str(rank) for rank, value in values.items()):
        return f"{min(values)}…{max(values)}, each rank its own"
    where: dict[str | None, list[int]] = {}
    for rank, value in values.items():
        where.setdefault(value, []).append(rank)
    lines = [
        f"rank{'s' * (len(ranks) > 1)} {compact(ranks)}: {'not set' if value is None else shortened(value)}"
        for value, ranks in list(where.items())[:VALUES_SHOWN]
    ]
    more = len(where) - VALUES_SHOWN
    return "\n".join([*lines, f"and {more} more (all of them with --result)"] if more > 0 else lines)


def screen(ranks: Sequence[dict[str, Any]]) -> str:
    """Who all ranks are, as text: a line a rank, their devices, the table, the launcher's variables."""
    lines = [f"{r['host']}$Process {r['rank']}: {r['local_rank']} # {r['world_size']}" for r in ranks]
    lines += [f"[Rank {r['rank']}] Default device is set to {r['device']}" for r in ranks]
    headers = ("rank", "local\nrank", "world\nsize", "node\nrank", "host", "pid", "master", "device",
               "affinity\n(cores)", "threads\nfound", "OMP_NUM_\nTHREADS", "threads in\ntraining")  # fmt: skip
    keys = ("rank", "local_rank", "world_size", "node_rank", "host", "pid", "master", "device",
            "cores", "threads_found", "omp_num_threads", "threads_in_training")  # fmt: skip
    shown = [r | {"cores": compact(r["cores"])} for r in ranks]
    rows = [["–" if r[key] is None else str(r[key]) for key in keys] for r in shown]
    return "\n".join([*lines, "", table(headers, rows), "", variables(ranks)])


def variables(ranks: Sequence[Mapping[str, Any]]) -> str:
    """The variables that the launcher set, as text."""
    title = "Variables that the launcher set"
    reasons: dict[str, list[int]] = {}
    for r in ranks:
        if r["variables"] is None:
            reasons.setdefault(r["variables_unknown"], []).append(r["rank"])
    unknown = [f"{title}: unknown on rank{'s' * (len(on) > 1)} {compact(on)} ({why})" for why, on in reasons.items()]
    known = [r for r in ranks if r["variables"] is not None]
    names = sorted({name for r in known for name in r["variables"]})
    if not names:
        launched = any(r["launched"] for r in known)
        none = "the ranks have the command's environment unchanged" if launched else "no launcher started this"
        return "\n".join([*unknown, *([f"{title}: none, {none}"] if known else [])])
    rows = [(name, by_rank({r["rank"]: r["variables"].get(name) for r in known})) for name in names]
    srun = "; srun's by their names" if "SLURM_STEP_ID" in names else ""
    how = f"{title} (new or changed since the command was started{srun})"
    return "\n".join([*unknown, how, table((), rows, indent=2)])


def talk(checks: Sequence[Check], backend: str | None, world_size: int) -> str:
    """What came of the collectives, as text."""
    if not backend:
        return "\nCollectives: none were run, one process without a group has nobody to talk to"
    head = f"\nCollectives over {backend} on small tensors, each run twice (the slowest rank's time in the second)"
    return "\n".join([head, *(f"  {check.line(world_size)}" for check in checks)])


def _result(rank: Rank, group: Group, ranks: Sequence[Mapping[str, Any]], checks: Sequence[Check]) -> dict[str, Any]:
    return {
        "launcher": rank.launcher,
        "world_size": rank.world_size,
        "backend": group.backend,
        "torch_version": torch.__version__,
        "ranks": list(ranks),
        "collectives": [check.as_json() for check in checks],
    }
