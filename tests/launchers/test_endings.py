"""However a run ends, it ends: every rank gone within 5 s, a status that is not 0, one sentence that says who failed and why.

The failing model notes the time just before it fails, so the 5 s count from the fault itself.
"""

import re
import signal
import socket
import time

import psutil
import pytest
from running import LAUNCHERS, Run, command, is_listening, tracebacks_of_ours

pytestmark = [pytest.mark.launch, pytest.mark.only_on("linux")]

PROMISED_S = 5.0
EVERY = (*LAUNCHERS, "openmpi")
MODEL = """
import os, pathlib, signal, time
import torch

class Fails(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(20, 2)
        self.calls = 0
        pathlib.Path(f"rank-{os.getpid()}").touch()

    def forward(self, x):
        if self.training:
            self.calls += 1
            if self.calls == 3:
                self.third()
        return self.layer(x)

    def third(self):
        rank = torch.distributed.get_rank()
        if rank == 1:
            if os.environ["PEERS"] != "talking":
                while len(list(pathlib.Path().glob("quiet-*"))) < torch.distributed.get_world_size() - 1:
                    time.sleep(0.01)
            pathlib.Path("failed.part").write_text(f"{os.getpid()} {time.monotonic()}")
            os.rename("failed.part", "failed")
            if os.environ["FAULT"] == "raise":
                raise ValueError("no such luck")
            if os.environ["FAULT"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if os.environ["FAULT"] == "exit":
                os._exit(3)
            if os.environ["FAULT"] == "segfault":
                import ctypes
                ctypes.string_at(0)
        elif os.environ["PEERS"] != "talking":
            if os.environ["PEERS"] == "stubborn":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            pathlib.Path(f"quiet-{rank}").touch()
            time.sleep(600)
"""
CAUSES = {
    "raise": "failed: ValueError: no such luck",
    "kill": "was killed by SIGKILL",
    "exit": "ended with exit status 3 before its work was done",
    "segfault": "was killed by SIGSEGV",
}


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def fail(tmp_path, launcher, fault, peers, world_size=3):
    """Runs a model whose rank 1 fails in its third step; returns what is left and how long the last rank outlived the fault."""
    (tmp_path / "broken.py").write_text(MODEL)
    flags = ("--job", "random", "--model", "broken:Fails", "--timeout", 60)
    run = Run(command(launcher, world_size, *flags), cwd=tmp_path, FAULT=fault, PEERS=peers)
    failed = tmp_path / "failed"
    run.until(failed.exists, "the fault")
    ranks = [int(file.name.partition("-")[2]) for file in tmp_path.glob("rank-*")]
    assert len(ranks) == world_size
    pid, at = failed.read_text().split()
    while any(alive(rank) for rank in ranks) and time.monotonic() < float(at) + 40:
        time.sleep(0.02)
    seconds = time.monotonic() - float(at)
    return run.finish(), int(pid), seconds


@pytest.mark.parametrize("launcher", EVERY)
@pytest.mark.parametrize(
    "fault, peers",
    [("raise", "talking"), ("raise", "quiet"), ("kill", "talking"), ("kill", "quiet"), ("exit", "talking"), ("exit", "quiet")],
)
def test_a_failing_rank_ends_all(tmp_path, launcher, fault, peers):
    ended, pid, seconds = fail(tmp_path, launcher, fault, peers)
    print(launcher, fault, peers, f"{seconds:.2f} s", f"status {ended.status}")
    assert ended.status not in (0, 2), str(ended)
    assert seconds < PROMISED_S, str(ended)
    sentences = re.findall(r"Rank (\d+) on (\S+) \(pid (\d+)\) (.*)", ended.err)
    assert len(sentences) == 1, str(ended)
    rank, host, told_pid, cause = sentences[0]
    assert (rank, host, told_pid) == ("1", socket.gethostname(), str(pid)), str(ended)
    assert cause.startswith(CAUSES[fault]), str(ended)
    assert "Epoch [5/5]" not in ended.out
    # What the failing rank raised is shown once; the others, which only lost a peer, add no traceback.
    assert tracebacks_of_ours(ended) == (1 if fault == "raise" else 0), str(ended)


@pytest.mark.parametrize("launcher", EVERY)
def test_ranks_that_ignore_the_request_to_leave_are_ended_too(tmp_path, launcher):
    ended, _, seconds = fail(tmp_path, launcher, "raise", "stubborn")
    assert ended.status not in (0, 2), str(ended)
    assert seconds < PROMISED_S, str(ended)
    assert len(re.findall(r"Rank 1 on \S+ \(pid \d+\) failed: ValueError: no such luck", ended.err)) == 1, str(ended)
