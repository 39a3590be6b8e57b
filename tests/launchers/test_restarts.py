"""Restarts: a group whose rank was killed forms again, every time, and ends as if nothing had happened."""

import json
import os
import re
import signal
import time

import psutil
import pytest
from running import HERE, Run, command, is_listening, tracebacks_of_ours

from common import events, now

pytestmark = [pytest.mark.launch, pytest.mark.only_on("linux")]

PROMISED_S = 5.0
# Before Linux 6.16 nothing tells the watcher how a rank ended that died, and was reaped, before it was up: within a first step.
MAY_BE_UNSEEN = tuple(int(number) for number in os.uname().release.split(".")[:2]) < (6, 16)
RESTARTS = 20
SHORT = ("--job", "random", "--epochs", 1, "--data_size", 256, "--timeout", 30)
LONG = ("--job", "random", "--epochs", 1_000_000, "--data_size", 256, "--timeout", 30)
MODEL = """
import os, pathlib, signal
import torch
from torch import distributed

restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))

class Dies(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(20, 2)
        self.steps = 0
        pathlib.Path(f"parent-{os.getppid()}").touch()

    def forward(self, x):
        if self.training and distributed.is_initialized():
            self.steps += 1
            turn = restart % distributed.get_world_size() == distributed.get_rank()
            if self.steps == 1 + restart % 3 and turn and restart < int(os.environ["FAILURES"]):
                os.kill(os.getpid(), signal.SIGKILL)
        return self.layer(x)
"""


def restarting(launcher, world_size, restarts, *flags):
    """The command line of a launcher that starts its ranks again."""
    words = command(launcher, world_size, *flags)
    return (
        [*words[:1], f"--max_restarts={restarts}", *words[1:]] if launcher == "torchrun" else [*words, "--max_restarts", restarts]
    )


def dying(tmp_path, launcher, failures, restarts, *flags):
    """A run of a model of which one rank is killed in each of the first starts."""
    (tmp_path / "mortal.py").write_text(MODEL)
    words = restarting(launcher, 2, restarts, *SHORT, "--model", "mortal:Dies", "--events", tmp_path / "events", *flags)
    return Run([str(word) for word in words], cwd=tmp_path, FAILURES=failures)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The loss of each step where no rank dies."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = dying(folder, "elastic", 0, 0, "--result", folder / "result.json")
    ended = run.finish()
    assert ended.status == 0 and not run.close(), str(ended)
    return json.loads((folder / "result.json").read_text())["loss_per_step"]


def took(rank, phase, since):
    return rank["phases"][phase] - rank["phases"][since]


@pytest.mark.parametrize("launcher", ("torchrun", "elastic"))
def test_twenty_restarts_in_a_row(tmp_path, launcher, undisturbed):
    ended = dying(tmp_path, launcher, RESTARTS, RESTARTS, "--result", tmp_path / "result.json").finish(200)
    assert ended.status == 0, str(ended)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["restart"] == RESTARTS and result["loss_per_step"] == undisturbed
    names = {f"rank-{rank}{f'.restart-{k}' * (k > 0)}.jsonl" for rank in (0, 1) for k in range(RESTARTS + 1)}
    assert {path.name for path in (tmp_path / "events").iterdir()} == names
    ranks = events.read(tmp_path / "events")
    assert len({rank["pid"] for rank in ranks}) == 2 * (RESTARTS + 1)
    assert all("group_joined" in rank["phases"] for rank in ranks)
    assert all(("training_done" in rank["phases"]) == (rank["restart"] == RESTARTS) for rank in ranks)
    # Each death is told, by the right name, and then the new start.
    told = re.findall(r"Rank (\d) on \S+ \(pid \d+\) (?:was killed by SIGKILL|ended without a word)", ended.err)
    assert len(told) == RESTARTS and (told == [str(k % 2) for k in range(RESTARTS)] or MAY_BE_UNSEEN), str(ended)
    shown = "elastic (forkserver)" if launcher == "elastic" else launcher
    assert re.findall(r"^Launcher (.*), restart (\d+): 2 ranks", ended.out, re.M) == [(shown, str(k + 1)) for k in range(RESTARTS)]
    if launcher == "elastic":
        assert "torch" not in ended.err and "Traceback" not in ended.err, str(ended)
        # A restart imports nothing again: the ranks are forked from the server of the first start.
        assert len(list(tmp_path.glob("parent-*"))) == 1
        assert {took(rank, "torch_imported", "interpreter_up") for rank in ranks if rank["restart"]} == {0}


@pytest.mark.parametrize("launcher", ("torchrun", "elastic"))
def test_more_failures_than_restarts_end_the_run(tmp_path, launcher):
    ended = dying(tmp_path, launcher, 3, 1).finish()
    assert ended.status == 1, str(ended)
    assert tracebacks_of_ours(ended) == 0
    told = re.findall(r"Rank (\d) on \S+ \(pid \d+\) (?:was killed by SIGKILL|ended without a word)", ended.err)
    assert len(told) == 2 and (told == ["0", "1"] or MAY_BE_UNSEEN), str(ended)  # one sentence a failure
    if launcher == "elastic":
        # The agent adds how the rank ended, unless the other's leaving reached it first.
        more = [line for line in ended.err.splitlines() if not line.startswith("Rank ")]
        assert more in ([], ["elastic.py: rank 1 ended first, with SIGKILL."]), str(ended)


def test_bad_input_is_not_tried_again(tmp_path):
    (tmp_path / "mortal.py").write_text(MODEL)
    words = restarting("elastic", 2, 3, *SHORT, "--model", "mortal:Missing")
    ended = Run([str(word) for word in words], cwd=tmp_path).finish()
    assert ended.status == 2 and "restart" not in ended.out, str(ended)
    assert len(ended.err.splitlines()) == 1 and ended.err.startswith("error: "), str(ended)


# ------------------------------------------------------------------------------------------------ how elastic.py ends


def fork_server(run):
    """The process whose children are the ranks."""
    return next(p for p in run.processes() if "multiprocessing.forkserver" in " ".join(p.cmdline()))


def training(folder, world_size, since=0.0):
    """The ranks, by number, of a group of this size that made its first step after ``since``; {} while there is none."""
    try:
        ranks = events.read(folder) if folder.is_dir() else []
    except ValueError:  # a line is being written
        return {}
    made = {r["rank"]: r for r in ranks if r["phases"].get("first_step_done", 0) > since and "process_ended" not in r["phases"]}
    there = {number: r for number, r in made.items() if r["world_size"] == world_size}
    return there if len(there) == world_size else {}


def started(tmp_path, *flags, ranks=2, **env):
    """elastic.py with ranks that train for long."""
    run = Run(command("elastic", ranks, "--max_restarts", 3, *LONG, "--events", tmp_path / "events", *flags), cwd=tmp_path, **env)
    run.until(lambda: training(tmp_path / "events", ranks), "the first step")
    return run


@pytest.mark.parametrize("how", ("Ctrl-C", "SIGTERM to the agent", "SIGKILL of the agent", "SIGKILL of the fork server"))
def test_however_it_is_ended_nothing_is_left(tmp_path, free_port, how):
    run = started(tmp_path, "--max_restarts", 0, "--master_port", free_port)
    began = time.monotonic()
    if how == "Ctrl-C":
        run.interrupt()
    elif how == "SIGKILL of the fork server":
        fork_server(run).kill()
    else:
        run.process.send_signal(signal.SIGTERM if "SIGTERM" in how else signal.SIGKILL)
    left = run.left_after(PROMISED_S)
    assert not left, [p.cmdline() for p in left]
    print(f"{how}: {time.monotonic() - began:.2f} s")
    ended = run.finish()
    assert ended.status == {"C": 130, "SIGTERM to": 143, "SIGKILL of the agent": -9}.get(how, ended.status)
    assert ended.status not in (0, 2) and tracebacks_of_ours(ended) == 0 and "Traceback" not in ended.err, str(ended)
    assert not is_listening(free_port)


def test_a_new_fork_server_takes_over(tmp_path):
    run = started(tmp_path, "--max_restarts", 1)
    at = now()
    fork_server(run).kill()
    again = run.until(lambda: training(tmp_path / "events", 2, at), "a step after the restart")
    assert {rank["restart"] for rank in again.values()} == {1}
    run.interrupt()
    run.finish()


# ------------------------------------------------------------------------------------------------------ several nodes


def node(tmp_path, nodes, port, *flags, **env):
    """One agent of several on this machine, with one rank."""
    where = ("--nnodes", nodes, "--master_addr", HERE, "--master_port", port, "--events", tmp_path / "events")
    return Run(command("elastic", 1, "--max_restarts", 3, *LONG, *where, *flags), cwd=tmp_path, **env)


def test_two_nodes_go_on_after_a_rank_is_killed(tmp_path, free_port):
    first = node(tmp_path, 2, free_port)
    first.until(lambda: is_listening(free_port), "the nodes' store")
    second = node(tmp_path, 2, free_port)
    ranks = first.until(lambda: training(tmp_path / "events", 2), "two ranks in one group")
    for victim in (1, 0):
        at = now()
        os.kill(ranks[victim]["pid"], signal.SIGKILL)
        ranks = first.until(lambda at=at: training(tmp_path / "events", 2, at), "both again")
        print(f"rank {victim} killed: {max(r['phases']['first_step_done'] for r in ranks.values()) - at:.2f} s")
    first.interrupt()
    assert first.finish().status == 130
    alone = second.finish()  # the agent that served the nodes' store is gone
    assert alone.status == 1 and "Traceback" not in alone.err, str(alone)
    assert re.search(rf"^elastic.py: no group at {HERE}:{free_port}, where the nodes meet: ", alone.err, re.M), str(alone)


def test_a_node_that_stays_alone_says_so(tmp_path, free_port):
    ended = node(tmp_path, 2, free_port, "--timeout", 1).finish()
    assert ended.status == 1, str(ended)
    assert re.fullmatch(rf"elastic.py: no group at {HERE}:{free_port}, where the nodes meet: .*\n", ended.err), str(ended)


def test_a_node_joins_and_is_lost(tmp_path, free_port):
    first = node(tmp_path, "1:2", free_port)
    first.until(lambda: training(tmp_path / "events", 1), "one rank alone")
    second = node(tmp_path, "1:2", free_port)
    first.until(lambda: training(tmp_path / "events", 2), "the second rank")
    at = now()
    second.kill()
    alone = first.until(lambda: training(tmp_path / "events", 1, at), "one rank alone again")
    print(f"a node killed: {alone[0]['phases']['first_step_done'] - at:.2f} s")
    assert not psutil.pid_exists(second.process.pid)
    first.interrupt()
    assert first.finish().status == 130
