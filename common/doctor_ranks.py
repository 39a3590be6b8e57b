"""Ranks of the doctor's own: how long does an all-reduce of 1 MB take?

    python -m common.doctor_ranks RANK WORLD_SIZE MASTER_ADDR MASTER_PORT INTERFACE

Each prints ``doctor {"seconds": …}`` or ``doctor {"error": …}``. The same program is run here and on other hosts.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from common import names
from common.doctor_rows import Answer, Row, Subject, ask, finding, ok, unchecked
from common.interfaces import interfaces, route_to
from common.ports import PortReservation

MEGABYTE = 1_000_000  # bytes of the vector
TURNS = 15  # timed all-reduces; the first few before them open the connections
ENOUGH_S = 2.0  # for the timed ones
SLOW_S = 0.05  # about 100 Mbit/s between two hosts; gradients of a small model take as long as its step then
LIMIT_S = 30.0


def rank(rank: int, world_size: int, address: str, port: int, interface: str) -> dict[str, Any]:
    """Joins the others and times the all-reduce: the median over ``TURNS``, in seconds."""
    import torch
    import torch.distributed as dist

    names.from_files_only()
    torch.set_num_threads(1)
    patience = timedelta(seconds=LIMIT_S / 2)
    store = dist.TCPStore(address, port, is_master=rank == 0, wait_for_workers=False, timeout=patience)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=patience)
    vector, turns = torch.ones(MEGABYTE // 4), TURNS
    took: list[float] = []
    while len(took) < 3 + turns:
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(vector)
        took.append(time.perf_counter() - began)
        vector.fill_(1.0)
        if len(took) == 3:  # all make as many more, fewer over a slow link
            slowest = torch.tensor(took[-1])
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            turns = max(2, min(TURNS, int(ENOUGH_S / float(slowest))))
    dist.all_reduce(vector)
    right = bool((vector == world_size).all())
    del vector
    dist.barrier()
    return {"seconds": statistics.median(took[3:]), "right": right, "interface": interface}


def command(python: str, rank: int, world_size: int, address: str, port: int, interface: str) -> list[str]:
    """The command of one rank, to be started in the repository's folder (or with it on PYTHONPATH)."""
    variables = ["GLOO_SOCKET_IFNAME=" + interface] if interface else []
    clean = [word for name in ("GLOO_SOCKET_IFNAME", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE") for word in ("-u", name)]
    program = [python, "-m", "common.doctor_ranks", str(rank), str(world_size), address, str(port), interface or "-"]
    return ["env", *clean, *variables, "OMP_NUM_THREADS=1", "TORCH_CPP_LOG_LEVEL=ERROR", *program]


def heard(answer: Answer) -> dict[str, Any]:
    """What a rank printed."""
    for line in reversed(answer.out.splitlines()):
        if line.startswith("doctor {"):
            found: dict[str, Any] = json.loads(line.partition(" ")[2])
            return found
    return {"error": answer.why or answer.last_line}


def all_reduce(subject: Subject, repository: str) -> Row:
    """Two ranks of this machine, over gloo and the loopback interface."""
    if "gloo" not in subject.torch.get("backends", ()):
        return unchecked("all-reduce", "it needs torch with gloo")
    loopback = next((i.name for i in interfaces() if i.is_loopback), "")
    env = dict(subject.environment) | {"PYTHONPATH": os.pathsep.join([repository, subject.environment.get("PYTHONPATH", "")])}
    with PortReservation(0) as port, ThreadPoolExecutor(2) as pool:
        words = [command(sys.executable, number, 2, "127.0.0.1", port, loopback) for number in range(2)]
        answers = list(pool.map(lambda words: ask(words, LIMIT_S, env), words))
    return judge([heard(answer) for answer in answers], "two ranks here, gloo", loopback)


def judge(told: Sequence[Mapping[str, Any]], who: str, interface: str) -> Row:
    """The row of an all-reduce whose ranks told ``told``."""
    if errors := [str(t["error"]) for t in told if "error" in t]:
        why = f"{who}: no all-reduce over {interface or 'the network'} ({errors[0][:200]})"
        return finding("all-reduce", why, "python launchers/plain.py --world_size 2 --inspect   # tells who reaches whom")
    seconds = max(float(t["seconds"]) for t in told)
    facts = {"seconds": seconds, "interface": interface}
    text = f"1 MB in {1000 * seconds:.1f} ms ({who}, {interface or 'gloo chose the interface'})"
    if not all(t["right"] for t in told):
        return finding(
            "all-reduce", f"{text}: a wrong sum", "memtest   # or another machine: a sum of ones cannot go wrong", **facts
        )
    if seconds > SLOW_S:
        slow = f"{text}: DDP would wait for its gradients, and may be slower than one process"
        return finding("all-reduce", slow, "export COMPRESS=fp16 ACCUMULATE=4   # or a faster link, a larger batch", **facts)
    return ok("all-reduce", text, **facts)


def main(words: Sequence[str]) -> None:
    """One rank."""
    number, world_size, address, port, interface = words
    try:
        if interface.startswith("@"):  # the one that leads to another rank's host
            route = route_to(interface[1:])
            interface = route.name if route else "-"
            if route:
                os.environ["GLOO_SOCKET_IFNAME"] = interface
        told = rank(int(number), int(world_size), address, int(port), interface)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        told = {"error": lines[0][:300]}
    sys.stdout.write(f"doctor {json.dumps(told)}\n")
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may ask for the interpreter while it ends


if __name__ == "__main__":
    main(sys.argv[1:])
