"""shared_memory.py: who may share, and what each collective computes, between real processes."""

import json
import platform
import subprocess
import sys

import pytest
import torch

from common import shared_memory
from common.command_line import parse_config
from common.gradients import choose_way
from common.ports import PortReservation
from common.process_group import Group
from common.rank import Rank
from tests.common.helpers import end_group, environment, refusal, start

CPU = torch.device("cpu")
ON_ONE = Rank("t", 0, 2, 0, 2, 0, "127.0.0.1", 1)
ON_TWO = Rank("t", 0, 2, 0, 1, 0, "node", 1)
linux_on_x86 = pytest.mark.only_on("linux")


def config(line=""):
    return parse_config("test.py", "", (), line.split(), {})


@linux_on_x86
def test_one_machine_may_share():
    assert shared_memory.obstacle(ON_ONE, CPU) == ""
    assert choose_way(config("--sync shared_memory"), ON_ONE, CPU).name == "shared_memory"


def test_other_devices_machines_and_processors_are_refused_in_words(monkeypatch):
    for device in ("cuda", "mps"):
        text = refusal(choose_way, config("--sync shared_memory"), ON_ONE, torch.device(device))
        assert f"gradients on {device} are not in the machine's memory" in text and "give --sync ddp, or auto" in text
    assert "on several machines" in refusal(choose_way, config("--sync shared_memory"), ON_TWO, CPU)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "aarch64 processors" in refusal(choose_way, config("--sync shared_memory"), ON_ONE, CPU)


@linux_on_x86
def test_auto_takes_the_fastest_that_fits_and_says_why(monkeypatch):
    auto = config("--sync auto")
    assert choose_way(auto, ON_ONE, CPU).name == "shared_memory"
    assert choose_way(auto, ON_TWO, CPU).name == "ddp" and "several machines" in choose_way(auto, ON_TWO, CPU).reason
    under_mpi = Rank("mpi", 0, 2, 0, 1, 0, "node", 1)
    assert choose_way(auto, under_mpi, CPU).name == "mpi"
    assert choose_way(config("--sync auto --compress fp16"), ON_ONE, CPU).name == "ddp"
    assert choose_way(auto, Rank("t"), CPU).name == "ddp"
    assert choose_way(auto, under_mpi, torch.device("cuda")).name == "ddp"
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert choose_way(auto, ON_ONE, CPU).name == "ddp"


def test_the_others_stay_what_was_asked_for():
    for name in ("ddp", "by_hand", "by_hand_flat"):
        way = choose_way(config(f"--sync {name}"), ON_TWO, CPU)
        assert (way.name, way.reason) == (name, "")


def test_a_process_on_its_own_shares_with_itself():
    memory = shared_memory.SharedMemory(Group(Rank("t"), CPU))
    tensor = torch.arange(7.0)
    memory.all_reduce(tensor)
    assert tensor.tolist() == list(range(7))
    memory.close()


# Every rank makes everyone's tensors itself, and so knows what must come out.
RANKS = """
import json, os, sys
import torch
from common.command_line import parse_config
from common.process_group import announce, process_group
from common.rank import Rank
from common.shared_memory import DIRECT, SLOT, SharedMemory

rank, world, port = map(int, sys.argv[1:4])
config = parse_config("t", argv=["--timeout", "20"], environment={})
cpu = torch.device("cpu")
TYPES = (torch.float32, torch.bfloat16) if world > 3 else (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = [1, 2, 3, 64, 1000, DIRECT // 4, DIRECT // 4 + 1, 50_001, SLOT // 4, SLOT // 4 + 1, 3 * SLOT // 4 + 17]

def everyones(shape, dtype, seed):
    made = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=made, dtype=torch.float64) * 8).to(dtype) for _ in range(world)]

def close(a, b, dtype):
    relative, absolute = (0.05, 0.2) if dtype.itemsize == 2 else (1e-5, 1e-5)
    return torch.allclose(a.double(), b.double(), rtol=relative, atol=absolute)

with process_group(announce(Rank("t", rank, world, rank, world, 0, "127.0.0.1", port), config), cpu) as group:
    memory = SharedMemory(group)
    wrong, digests, seed = [], [], 0
    for turn in range(2):
        for n in SIZES:
            for dtype in TYPES:
                seed += 1
                parts = everyones(n, dtype, seed)
                total = torch.stack(parts).double().sum(0)
                for mean in (False, True):
                    own = parts[rank].clone()
                    memory.all_reduce(own, mean)
                    if not close(own, total / (world if mean else 1), dtype):
                        wrong.append(("all_reduce", n, str(dtype), mean))
                    digests.append(hash(own.double().numpy().tobytes()))
                if turn:
                    continue
                src = seed % world
                own = parts[rank].clone()
                memory.broadcast(own, src)
                if not torch.equal(own, parts[src]):
                    wrong.append(("broadcast", n, str(dtype), src))
                gathered = torch.empty(world * n, dtype=dtype)
                memory.all_gather(gathered, parts[rank])
                if not torch.equal(gathered, torch.cat(parts)):
                    wrong.append(("all_gather", n, str(dtype)))
                parts = everyones(world * n, dtype, seed)
                scattered = torch.empty(n, dtype=dtype)
                memory.reduce_scatter(scattered, parts[rank])
                if not close(scattered, torch.stack(parts).double().sum(0).view(world, n)[rank], dtype):
                    wrong.append(("reduce_scatter", n, str(dtype)))
    shaped = everyones((6, 4, 5, 3), torch.float32, 5)
    strange = shaped[rank].to(memory_format=torch.channels_last)
    memory.all_reduce(strange)
    right = close(strange, torch.stack(shaped).double().sum(0), torch.float32)
    if not right or not strange.is_contiguous(memory_format=torch.channels_last):
        wrong.append("channels_last")
    for turn in range(500):  # quick ones, one after the other: nobody may be overtaken
        small = torch.tensor([float(turn + rank)])
        memory.all_reduce(small)
        if small.item() != world * turn + world * (world - 1) / 2:
            wrong.append(("turn", turn, small.item()))
    maps = open("/proc/self/maps").read()
    print(json.dumps({"wrong": wrong[:20], "digest": hash(tuple(digests)), "memfd": "/memfd:launchlab (deleted)" in maps}))
    memory.close()
"""


def ranks(code, world, *arguments, before=()):
    """Runs ``code`` as so many ranks; ``before`` comes before the command of rank 1. (status, stdout, stderr) of each."""
    with PortReservation(0) as number:  # let go of again: these ranks bind it themselves
        pass
    children = []
    try:
        for rank in range(world):
            words = [sys.executable, "-c", code, str(rank), str(world), str(number), *map(str, arguments)]
            variables = environment(OMP_NUM_THREADS="1", PYTHONHASHSEED="0")
            children.append(start([*(before if rank == 1 else ()), *words], env=variables))
        ended = []
        for child in children:
            out, err = child.communicate(timeout=100)
            ended.append((child.returncode, out, err))
        return ended
    finally:
        for child in children:
            end_group(child)


@pytest.mark.launch
@linux_on_x86
@pytest.mark.parametrize("world", (1, 2, 3, 5))
def test_every_collective_of_every_size_and_type(world):
    told = []
    for status, out, err in ranks(RANKS, world):
        assert status == 0, err
        told.append(json.loads(out.splitlines()[-1]))
    for one in told:
        assert one["wrong"] == []
        assert one["memfd"]  # no name in /dev/shm: gone with its processes
    assert len({one["digest"] for one in told}) == 1  # the same bits on all ranks


OTHERS_MEMORY = """
import sys
import torch
from common.command_line import parse_config
from common.errors import exit_status
from common.process_group import announce, process_group
from common.rank import Rank
from common.shared_memory import SharedMemory

rank, world, port = map(int, sys.argv[1:4])

def main():
    config = parse_config("t", argv=["--timeout", "20"], environment={})
    with process_group(announce(Rank("t", rank, world, rank, world, 0, "127.0.0.1", port), config), torch.device("cpu")) as group:
        SharedMemory(group)

sys.exit(exit_status(main))
"""


@pytest.mark.launch
@linux_on_x86
def test_ranks_in_different_containers_are_refused_on_all_of_them():
    """Another PID namespace is what makes a container here: rank 0's process has another number there, or none."""
    unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*unshare, "true"], capture_output=True, timeout=20).returncode:
        pytest.skip("this user may make no PID namespace")
    for status, _, err in ranks(OTHERS_MEMORY, 2, before=unshare):
        assert status == 2, err
        (line,) = [line for line in err.splitlines() if line.startswith("error:")]
        assert "rank 1 cannot open rank 0's memory" in line and "ranks must be in one container" in line
