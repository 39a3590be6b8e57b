"""However a run ends, it ends: every rank gone within 5 s, a status that is not 0, one sentence that says who failed and why.

The failing model notes the time just before it fails, so the 5 s count from the fault itself.
"""

import os
import re
import signal
import socket
import time

import psutil
import pytest
from running import ALL, FORKED, MPIS, ROOT, SPAWNS, Run, command, is_listening, tracebacks_of_ours

from common.config import COMPRESSIONS

pytestmark = [pytest.mark.launch, pytest.mark.only_on("linux")]

PROMISED_S = 5.0
# Before Linux 6.15 only the parent can ask how a process ended; a launcher that is faster than the watcher leaves it this.
MAY_BE_UNSEEN = tuple(int(number) for number in os.uname().release.split(".")[:2]) < (6, 15)
LAUNCHER_FILES = ROOT / "launchers"
EVERY = (*ALL, "openmpi")
WITH_MPI = ("mpi", *MPIS)
QUIET_OR_TALKING = [(fault, peers) for fault in ("raise", "kill", "exit") for peers in ("talking", "quiet")]
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
            if self.calls == int(os.environ.get("STEP", 3)):
                self.fail()
        return self.layer(x)

    def fail(self):
        rank = torch.distributed.get_rank()
        if rank == int(os.environ.get("WHO", 1)):
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
            if os.environ["FAULT"] == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
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


def fail(tmp_path, launcher, fault, peers, *more, world_size=3, timeout=60, who=1, step=3):
    """Runs a model whose rank ``who`` fails in a step; returns what is left and how long the last outlived the fault."""
    (tmp_path / "broken.py").write_text(MODEL)
    flags = ("--job", "random", "--model", "broken:Fails", "--timeout", timeout, *more)
    run = Run(command(launcher, world_size, *flags), cwd=tmp_path, FAULT=fault, PEERS=peers, WHO=who, STEP=step)
    failed = tmp_path / "failed"
    run.until(failed.exists, "the fault")
    ranks = [int(file.name.partition("-")[2]) for file in tmp_path.glob("rank-*")]
    assert len(ranks) == world_size
    pid, at = failed.read_text().split()
    while any(alive(rank) for rank in ranks) and time.monotonic() < float(at) + 40:
        time.sleep(0.02)
    seconds = time.monotonic() - float(at)
    return run.finish(), int(pid), seconds


@pytest.mark.parametrize(
    "launcher, fault, peers, more",
    [
        *((launcher, *case, ()) for launcher in EVERY for case in QUIET_OR_TALKING),
        *((spawn, *case, ()) for spawn in SPAWNS for case in (("raise", "quiet"), ("kill", "talking"))),
        # In Allreduce, which waits in C for the dead, deaf to signals that Python would handle.
        *((launcher, fault, "talking", ("--sync", "mpi")) for launcher in WITH_MPI for fault in ("raise", "kill", "exit")),
        # In the hooks' callbacks, on gloo's thread.
        *(("torchrun", fault, "talking", ("--compress", name)) for name in COMPRESSIONS for fault in ("raise", "kill")),
    ],
)
def test_a_failing_rank_ends_all(tmp_path, launcher, fault, peers, more):
    step = 15 if more else 3  # powersgd compresses from the tenth on
    ended, pid, seconds = fail(tmp_path, launcher, fault, peers, *more, step=step)
    print(launcher, fault, peers, f"{seconds:.2f} s", f"status {ended.status}")
    assert ended.status not in (0, 2), str(ended)
    assert seconds < PROMISED_S, str(ended)
    sentences = re.findall(r"Rank (\d+) on (\S+) \(pid (\d+)\) (.*)", ended.err)
    assert len(sentences) == 1, str(ended)
    rank, host, told_pid, cause = sentences[0]
    assert (rank, host, told_pid) == ("1", socket.gethostname(), str(pid)), str(ended)
    assert cause.startswith(CAUSES[fault]) or (fault != "raise" and MAY_BE_UNSEEN and cause.startswith("ended without a word")), (
        str(ended)
    )
    # What the launcher's parent adds must not blame another rank.
    assert set(re.findall(r"(?:plain|spawn|elastic)\.py: rank (\d+) ended first", ended.err)) <= {"1"}, str(ended)
    assert "Epoch [5/5]" not in ended.out
    # What the failing rank raised is shown once; the others, which only lost a peer, add no traceback.
    assert tracebacks_of_ours(ended) == (1 if fault == "raise" else 0), str(ended)


@pytest.mark.parametrize("launcher", EVERY)
def test_ranks_that_ignore_the_request_to_leave_are_ended_too(tmp_path, launcher):
    ended, _, seconds = fail(tmp_path, launcher, "raise", "stubborn")
    assert ended.status not in (0, 2), str(ended)
    assert seconds < PROMISED_S, str(ended)
    assert len(re.findall(r"Rank 1 on \S+ \(pid \d+\) failed: ValueError: no such luck", ended.err)) == 1, str(ended)


def test_a_crash_is_named_too(tmp_path):
    ended, _, seconds = fail(tmp_path, "mpi", "segfault", "quiet")
    assert ended.status not in (0, 2), str(ended)
    assert seconds < PROMISED_S, str(ended)
    assert re.search(r"Rank 1 on \S+ \(pid \d+\) (was killed by SIGSEGV|ended without a word)", ended.err), str(ended)


HANGS_S = 3


@pytest.mark.parametrize("launcher, who, named", [
    *((launcher, 1, "rank 1, which is silent") for launcher in WITH_MPI),
    ("mpi", 0, "rank 0, which does not answer"),  # it serves the store
])  # fmt: skip
def test_a_rank_that_hangs_is_named_by_those_that_wait_in_allreduce(tmp_path, launcher, who, named):
    ended, _, seconds = fail(tmp_path, launcher, "stop", "talking", "--sync", "mpi", timeout=HANGS_S, who=who)
    print(launcher, who, f"{seconds:.2f} s", f"status {ended.status}")
    assert ended.status not in (0, 2), str(ended)
    assert HANGS_S * 0.9 < seconds < HANGS_S + PROMISED_S, str(ended)
    sentences = re.findall(r"Rank (\d) on \S+ \(pid \d+\) (.*); ending the other 2 ranks here\.", ended.err)
    assert [cause for _, cause in sentences] == [f"waited {HANGS_S} s (--timeout) in MPI's Allreduce for {named}"], str(ended)
    assert sentences[0][0] != str(who) and tracebacks_of_ours(ended) == 0, str(ended)


def is_rank(process, run, launcher):
    """Whether a process of the run is a rank of spawn.py or elastic.py, which set no variable that can be seen from outside."""
    if launcher == "spawn (fork)":
        return process.ppid() == run.process.pid and process.cmdline()[1:] == run.words[1:]
    code = "multiprocessing.spawn" if launcher == "spawn (spawn)" else "multiprocessing.forkserver"
    if not any(code in word for word in process.cmdline()):
        return False
    starter = process if launcher == "spawn (spawn)" else psutil.Process(process.ppid())
    return starter.ppid() == run.process.pid


def rank_processes(run, launcher, world_size):
    """The processes of the ranks, once all have appeared, by rank, or else in the order of starting."""
    by_number = not launcher.startswith(FORKED)

    def look():
        found = {}
        for process in run.processes():
            try:
                if by_number:
                    words, environment = process.cmdline(), process.environ()
                    name = {"mpi": "PMI_RANK", "openmpi": "OMPI_COMM_WORLD_RANK"}.get(launcher, "RANK")
                    if any(word.endswith(".py") for word in words) and name in environment:
                        found[int(environment[name])] = process
                elif is_rank(process, run, launcher):
                    found[process.create_time(), process.pid] = process
            except psutil.Error:
                continue
        return len(found) == world_size and [found[key] for key in sorted(found)]

    return run.until(look, "all rank processes")


def fork_server(run):
    """The process that the ranks are forked from, once it is there."""

    def look():
        for process in psutil.Process(run.process.pid).children():
            if any("multiprocessing.forkserver" in word for word in process.cmdline()):
                return process
        return None

    return run.until(look, "the fork server")


@pytest.mark.parametrize("launcher", [*(name for name in EVERY if name not in FORKED), "spawn (spawn)"])
def test_a_rank_that_is_killed_before_it_joins(tmp_path, launcher):
    run = Run(command(launcher, 3, "--job", "random"), cwd=tmp_path)
    ranks = rank_processes(run, launcher, 3)
    ranks[1].send_signal(signal.SIGKILL)
    at = time.monotonic()
    run.until(lambda: not any(alive(rank.pid) for rank in ranks) or time.monotonic() > at + 40, "the end of the ranks")
    seconds = time.monotonic() - at
    ended = run.finish()
    assert "Process initialized" not in ended.out, str(ended)
    assert ended.status not in (0, 2), str(ended)
    assert seconds < PROMISED_S, str(ended)
    assert tracebacks_of_ours(ended) == 0, str(ended)
    # Nobody of ours knew the rank yet: its launcher tells of it.
    said = {
        "plain": r"^plain.py: rank 1 ended first, with SIGKILL\.$",
        "spawn (spawn)": r"^spawn.py: rank 1 ended first, with SIGKILL\.$",
        "torchrun": r"exitcode: -9 \(local_rank: 1\)|rank +: 1 \(local_rank: 1\)",
        "mpi": r"KILLED BY SIGNAL: 9|EXIT CODE: 9",
        "openmpi": r"(?i)rank 1 .*signal 9|killed",
    }[launcher]
    assert re.search(said, ended.err + ended.out, re.MULTILINE), str(ended)


SECOND_FORK_DIES = """
import os, signal, sys
if any("multiprocessing.forkserver" in word for word in sys.orig_argv):
    forks = []
    os.register_at_fork(before=lambda: forks.append(1),
                        after_in_child=lambda: len(forks) == 2 and os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.parametrize("launcher", FORKED)
def test_a_rank_that_is_killed_as_it_is_forked(tmp_path, launcher):
    """It joins within milliseconds, so the server itself is made to fork one that dies."""
    (tmp_path / "sitecustomize.py").write_text(SECOND_FORK_DIES)
    ended = Run(command(launcher, 3, "--job", "random"), cwd=tmp_path, PYTHONPATH=tmp_path).finish(30)
    assert ended.status == 1, str(ended)
    assert "Epoch" not in ended.out and tracebacks_of_ours(ended) == 0, str(ended)
    assert ended.err.count(f"{launcher}.py: rank 1 ended first, with SIGKILL.\n") == 1, str(ended)


LONG = ("--job", "random", "--epochs", 1_000_000, "--data_size", 256)


@pytest.mark.parametrize(
    "launcher, world_size, sync",
    [
        *((name, n, "ddp") for name in EVERY for n in (1, 2)),
        *((name, 2, "ddp") for name in SPAWNS),
        *((name, 2, "mpi") for name in WITH_MPI),
    ],
)
def test_ctrl_c(tmp_path, launcher, world_size, sync):
    run = Run(command(launcher, world_size, *LONG, "--sync", sync), cwd=tmp_path)
    run.until(lambda: "Epoch [3/" in run.out, "the third epoch")
    run.interrupt()
    at = time.monotonic()
    run.process.wait(60)
    seconds = time.monotonic() - at
    ended = run.finish()
    assert seconds < PROMISED_S, str(ended)
    assert ended.status != 0, str(ended)
    assert tracebacks_of_ours(ended) == 0, str(ended)
    if launcher in ("plain", "spawn"):
        assert (ended.status, ended.err) == (130, ""), str(ended)


# Not torchrun's and mpirun's earliest: Python can lose a SIGINT while it starts, and torchrun then waits 30 s before SIGKILL.
@pytest.mark.parametrize(
    "launcher, early",
    [(name, True) for name in ("plain", *FORKED, "spawn (spawn)")] + [(name, False) for name in (*EVERY, "spawn (fork)")],
)
def test_ctrl_c_while_starting(tmp_path, launcher, early):
    run = Run(command(launcher, 2, *LONG), cwd=tmp_path)
    if early and launcher in FORKED:
        fork_server(run)
    elif early:
        rank_processes(run, launcher, 2)
    else:
        run.until(lambda: "Process initialized" in run.out, "the first rank")
    run.interrupt()
    at = time.monotonic()
    run.process.wait(60)
    seconds = time.monotonic() - at
    ended = run.finish()
    assert seconds < PROMISED_S, str(ended)
    assert ended.status != 0, str(ended)
    if launcher in FORKED:
        said = [row for row in ended.err.splitlines() if "shutting down workers" not in row]  # torch-elastic's own words
        assert (ended.status, said) == (130, []), str(ended)


@pytest.mark.parametrize(
    "launcher, killed", [(name, "launcher") for name in (*EVERY, *SPAWNS)] + [(name, "fork server") for name in FORKED]
)
def test_a_killed_launcher_takes_its_ranks_along(tmp_path, launcher, killed):
    run = Run(command(launcher, 3, *LONG), cwd=tmp_path)
    ranks = rank_processes(run, launcher, 3)
    run.until(lambda: "Epoch [3/" in run.out, "the third epoch")
    (run.process if killed == "launcher" else fork_server(run)).kill()
    at = time.monotonic()
    while any(alive(rank.pid) for rank in ranks) and time.monotonic() < at + 40:
        time.sleep(0.02)
    assert time.monotonic() - at < PROMISED_S, run.err
    run.finish()


def alone(tmp_path, rank, port, *flags):
    words = ["python", str(LAUNCHER_FILES / "plain.py"), "--job", "random", *map(str, flags)]
    return Run(words, cwd=tmp_path, RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def test_a_rank_that_never_arrives_is_named(tmp_path, free_port):
    ended = alone(tmp_path, 0, free_port, "--timeout", 2).finish(60)
    assert ended.status == 1, str(ended)
    assert re.fullmatch(
        r"Rank 0 on \S+ \(pid \d+\) failed: rank 1 of 2 did not arrive within 2 s \(--timeout\): .*\n", ended.err
    ), str(ended)


def test_a_rank_0_that_never_arrives_is_named(tmp_path, free_port):
    ended = alone(tmp_path, 1, free_port, "--timeout", 2).finish(60)
    assert ended.status == 1, str(ended)
    assert re.fullmatch(
        rf"Rank 1 on \S+ \(pid \d+\) failed: rank 1 waited 2 s \(--timeout\) for rank 0 at 127.0.0.1:{free_port}: .*\n", ended.err
    ), str(ended)


def test_a_hand_started_rank_that_dies_ends_its_peer(tmp_path, free_port):
    """Nobody started both, so only the watcher can see to it."""
    (tmp_path / "broken.py").write_text(MODEL)
    both = []
    for rank in (0, 1):
        words = ["python", str(LAUNCHER_FILES / "plain.py"), "--job", "random", "--model", "broken:Fails"]
        group = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
        both.append(Run(words, cwd=tmp_path, FAULT="kill", PEERS="quiet", **group))
    both[0].until((tmp_path / "failed").exists, "the fault")
    both[0].process.wait(60)
    seconds = time.monotonic() - float((tmp_path / "failed").read_text().split()[1])
    first, second = (run.finish() for run in both)
    assert seconds < PROMISED_S, str(first)
    assert first.status != 0 and second.status == -signal.SIGKILL
    said = first.err + second.err
    assert len(re.findall(rf"Rank 1 on {socket.gethostname()} \(pid {both[1].process.pid}\) was killed by SIGKILL", said)) == 1, (
        said
    )


@pytest.mark.parametrize("fault", (None, "kill"))
def test_the_port_and_the_watchers_name_are_free_again(tmp_path, free_port, fault):
    (tmp_path / "broken.py").write_text(MODEL)
    flags = ("--job", "random", "--epochs", 1, "--master_port", free_port)
    model = ("--model", "broken:Fails") if fault else ()
    run = Run(command("plain", 2, *flags, *model), cwd=tmp_path, FAULT=fault or "", PEERS="talking")
    run.until(lambda: is_listening(free_port), "a listener")
    assert (run.finish().status == 0) == (fault is None)
    assert not is_listening(free_port)


def test_no_run_of_many_short_ones_crashes_as_it_leaves(tmp_path):
    """A gloo thread that outlived the interpreter once ended every second run with SIGABRT after all had gone well."""
    for number in range(8):
        ended = Run(command("torchrun", 2, "--job", "random", "--epochs", 1), cwd=tmp_path).finish()
        assert ended.status == 0, f"run {number}: {ended}"
