"""The ways of --sync: the same loss under every launcher, and shared memory however a run ends."""

import json
import os
import re
import signal
import socket
import time

import pytest
from running import ALL, HERE, ROOT, Run, command, run, trained
from test_endings import CAUSES, MAY_BE_UNSEEN, PROMISED_S, fail
from test_parity import JOBS, difference

pytestmark = [pytest.mark.launch, pytest.mark.only_on("linux")]

LOSSLESS = ("by_hand", "by_hand_flat", "shared_memory")  # mpi's are in test_mpi_allreduce.py


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The result of one process on its own, for a job and precision."""
    made = {}

    def get(job, precision="fp64"):
        if (job, precision) not in made:
            file = tmp_path_factory.mktemp("alone") / "result.json"
            made[job, precision] = trained(words("plain", 1, job, precision), file)
        return made[job, precision]

    return get


def words(launcher, world_size, job, precision, *more):
    return command(launcher, world_size, "--job", job, *JOBS[job], "--precision", precision, "--threads", 1, *more)


@pytest.mark.parametrize("sync", LOSSLESS)
@pytest.mark.parametrize("launcher", ALL)
def test_every_lossless_way_computes_what_one_process_computes(alone, tmp_path, launcher, sync):
    one = alone("random")
    many = trained(words(launcher, 3, "random", "fp64", "--sync", sync), tmp_path / "r.json")
    assert (many["launcher"], many["world_size"], many["sync"], many["sync_asked"]) == (launcher, 3, sync, sync)
    for curve in ("loss_per_step", "train_loss_per_epoch", "eval_loss_per_epoch"):
        assert difference(many[curve], one[curve]) < 1e-9, curve


@pytest.mark.parametrize("sync, world_size", [*((sync, 2) for sync in LOSSLESS), ("shared_memory", 5)])
def test_digits(alone, tmp_path, sync, world_size):
    for precision, limit, steps in (("fp64", 1e-9, None), ("fp32", 1e-5, 20)):
        many = trained(words("spawn", world_size, "digits", precision, "--sync", sync), tmp_path / "r.json")
        curve = alone("digits", precision)["loss_per_step"]
        assert difference(many["loss_per_step"][:steps], curve[:steps]) < limit


@pytest.mark.parametrize("flags", [("--bucket_mb", 0.05), ("--accumulate", 3), ("--bucket_mb", 0.01, "--accumulate", 2)], ids=str)
def test_shared_memory_with_several_buckets_and_accumulation(alone, tmp_path, flags):
    many = trained(words("spawn", 2, "digits", "fp64", "--sync", "shared_memory", *flags), tmp_path / "r.json")
    assert difference(many["loss_per_step"], alone("digits")["loss_per_step"]) < 1e-9


def test_by_hand_is_ddp(tmp_path):
    """In float32, over a whole run whose rounding does not grow."""
    ddp, *by_hand = [
        trained(words("spawn", 3, "random", "fp32", "--sync", sync), tmp_path / f"{sync}.json")
        for sync in ("ddp", "by_hand", "by_hand_flat")
    ]
    for one in by_hand:
        assert difference(one["loss_per_step"], ddp["loss_per_step"]) < 1e-6


UNUSED = """
import torch
class Net(torch.nn.Module):
    '''Three ranks use different parameters, and none uses the last.'''
    def __init__(self, input_size=20):
        super().__init__()
        self.parts = torch.nn.ModuleList(torch.nn.Linear(input_size, 2) for _ in range(4))
        self.turn = 0
    def forward(self, x):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        if self.training:
            self.turn += 1
        return self.parts[(rank + self.turn) % 3](x)
"""


@pytest.mark.parametrize("sync", ("ddp", "shared_memory"))
def test_parameters_that_are_not_used(tmp_path, sync):
    (tmp_path / "mine.py").write_text(UNUSED)
    flags = ("--job", "random", "--model", "mine:Net", "--epochs", 1, "--precision", "fp64", "--sync")
    by_hand = trained(command("spawn", 3, *flags, "by_hand"), tmp_path / "by_hand.json", tmp_path)
    many = trained(command("spawn", 3, *flags, sync, "--find_unused_parameters"), tmp_path / "r.json", tmp_path)
    assert difference(many["loss_per_step"], by_hand["loss_per_step"]) < 1e-9


def test_auto_says_what_it_chose(tmp_path):
    ended = run([*command("torchrun", 2, "--job", "random", "--epochs", 1, "--sync", "auto"), "--result", str(tmp_path / "r.json")])
    assert ended.status == 0, str(ended)
    assert "Gradients: shared_memory (--sync auto: all ranks are on this machine)" in ended.out
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["sync"], result["sync_asked"]) == ("shared_memory", "auto")


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--sync", "mpi"), "--sync mpi under spawn.py: its ranks are in no MPI world"),
        (("--sync", "by_hand", "--compress", "fp16"), "--compress fp16 with --sync by_hand: only ddp sends gradients smaller"),
        (("--sync", "by_hand", "--bucket_mb", 3), "--bucket_mb with --sync by_hand: it is DistributedDataParallel's"),
        (("--sync", "nccl"), "--sync nccl: not allowed; give one of ddp, by_hand, by_hand_flat, shared_memory, mpi, auto"),
        (("--bucket_mb", 0), "--bucket_mb 0: not allowed; give a number above 0"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(flags, said):
    ended = run(command("spawn", 2, "--job", "random", *flags))
    assert ended.status == 2 and ended.out == "", str(ended)
    assert ended.err.startswith(f"error: {said}") and len(ended.err.splitlines()) == 1, str(ended)


def test_several_machines_are_refused_on_all_ranks():
    """Two nodes, both here."""
    flags = ("--job", "random", "--sync", "shared_memory", "--nnodes", 2, "--master_addr", HERE, "--timeout", 30)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = [Run(command("spawn", 2, *flags, "--node_rank", n, "--master_port", port)) for n in (0, 1)]
    for node in nodes:
        ended = node.finish()
        assert ended.status == 2, str(ended)
        assert "error: --sync shared_memory: the 2 ranks are on several machines" in ended.err, str(ended)


@pytest.mark.parametrize("fault, peers", [(fault, peers) for fault in ("raise", "kill", "exit") for peers in ("talking", "quiet")])
@pytest.mark.parametrize("launcher", ("plain", "spawn", "mpi"))
def test_a_rank_that_fails_while_the_others_wait_for_it(tmp_path, launcher, fault, peers):
    ended, pid, seconds = fail(tmp_path, launcher, fault, peers, "--sync", "shared_memory")
    assert ended.status not in (0, 2), str(ended)
    assert seconds < PROMISED_S, str(ended)
    ((rank, told_pid, cause),) = re.findall(r"Rank (\d+) on \S+ \(pid (\d+)\) (.*)", ended.err)
    assert (rank, told_pid) == ("1", str(pid)), str(ended)
    assert cause.startswith(CAUSES[fault]) or (MAY_BE_UNSEEN and cause.startswith("ended without a word")), str(ended)


STOPS = """
import os, pathlib, signal
import torch
class Stops(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(20, 2)
        self.calls = 0
    def forward(self, x):
        self.calls += self.training
        if self.calls == 3:
            pathlib.Path(f"rank-{os.getpid()}").touch()
            if torch.distributed.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
        return self.layer(x)
"""


def test_a_rank_that_hangs_is_named_within_the_time_limit(tmp_path):
    (tmp_path / "broken.py").write_text(STOPS)
    flags = ("--job", "random", "--model", "broken:Stops", "--sync", "shared_memory", "--timeout", 2)
    began = time.monotonic()
    ended = run(command("spawn", 3, *flags), cwd=tmp_path)
    assert ended.status == 1, str(ended)
    assert time.monotonic() - began < 20
    (sentence,) = re.findall(r"Rank [02] on \S+ \(pid \d+\) failed: (.*)", ended.err)
    assert sentence.startswith("rank 1 of 3 did not come to the all-reduce within 2 s (--timeout)"), str(ended)


def test_nothing_is_left_after_all_ranks_were_killed_at_once(tmp_path):
    """The memory has no name; it ends with its processes."""
    before = set(os.listdir("/dev/shm"))
    (tmp_path / "broken.py").write_text(STOPS)
    flags = ("--job", "random", "--model", "broken:Stops", "--sync", "shared_memory", "--timeout", 60)
    run_ = Run(command("plain", 2, *flags), cwd=tmp_path)
    ranks = run_.until(lambda: len(found := list(tmp_path.glob("rank-*"))) == 2 and found, "the third step")
    maps = [(ROOT / f"/proc/{rank.name.partition('-')[2]}/maps").read_text() for rank in ranks]
    assert all("/memfd:launchlab (deleted)" in text and "/dev/shm" not in text for text in maps)
    os.killpg(run_.process.pid, signal.SIGKILL)
    run_.kill()
    assert set(os.listdir("/dev/shm")) - before == set()
