"""--debug under every launcher: torch heeds what it sets, one line says it, and a rank that hangs shows where."""

import os
import re
import signal

import pytest
from running import ALL, SPAWNS, command, run
from running import Run as Started

from common import events

pytestmark = [pytest.mark.launch, pytest.mark.only_on("linux")]

SHORT = ("--job", "random", "--data_size", 128, "--epochs", 1)
HANGS = """
import time
import torch

class Hangs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(20, 2)

    def forward(self, x):
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            self.wait_for_ever()
        return self.layer(x)

    def wait_for_ever(self):
        time.sleep(600)
"""


@pytest.mark.parametrize("launcher", (*ALL, *SPAWNS))
def test_what_is_set_is_heeded_and_told_once(tmp_path, launcher):
    ended = run(command(launcher, 2, *SHORT, "--debug"), cwd=tmp_path, NCCL_DEBUG="WARN")
    assert ended.status == 0 and "Epoch [1/1]" in ended.out, str(ended)
    assert re.findall(r"^--debug .*$", ended.err, re.M) == [
        "--debug set TORCH_DISTRIBUTED_DEBUG=INFO, TORCH_CPP_LOG_LEVEL=INFO, TORCH_SHOW_CPP_STACKTRACES=1, PYTHONFAULTHANDLER=1; "
        "it left NCCL_DEBUG=WARN; kill -USR1 PID shows where a rank is, and so does its end"
    ]
    for rank in (0, 1):  # the C++ log, after a fork too
        assert re.search(rf"^\[rank{rank}\]:\[I.*\] Reducer initialized", ended.err, re.M), str(ended)
    assert len(re.findall(r"^Process ids: rank 0 is \d+ on \S+, 1 is \d+ on \S+$", ended.out, re.M)) == 1, str(ended)


def test_without_it_nothing_is_said(tmp_path):
    ended = run(command("spawn", 2, *SHORT), cwd=tmp_path, DEBUG="app:*")
    assert (ended.status, ended.err) == (0, ""), str(ended)
    assert "Process ids" not in ended.out


def test_what_the_user_has_set_stays(tmp_path):
    ended = run(command("spawn", 2, *SHORT, "--debug"), cwd=tmp_path, TORCH_CPP_LOG_LEVEL="ERROR", TORCH_DISTRIBUTED_DEBUG="OFF")
    assert ended.status == 0, str(ended)
    assert len(ended.err.splitlines()) == 1 and "it left TORCH_DISTRIBUTED_DEBUG=OFF, TORCH_CPP_LOG_LEVEL=ERROR" in ended.err, str(
        ended
    )


@pytest.mark.parametrize("launcher", ("spawn", "mpi"))
def test_a_rank_that_hangs_shows_where(tmp_path, launcher):
    """On a signal, as often as it is asked; and when the others' time is up and the watcher ends it."""
    (tmp_path / "hangs.py").write_text(HANGS)
    words = command(launcher, 2, "--job", "random", "--model", "hangs:Hangs", "--debug", "--timeout", 12, "--events", "events")
    run = Started(words, cwd=tmp_path)
    ranks = run.until(lambda: [r for r in events.read(tmp_path / "events") if "model_built" in r["phases"]][1:], "rank 1's model")
    where = r'File ".*hangs\.py", line \d+ in wait_for_ever'

    def asked():
        os.kill(ranks[0]["pid"], signal.SIGUSR1)
        return re.search(where, run.err)

    run.until(asked, "where rank 1 is")
    ended = run.finish()
    assert ended.status not in (0, 2), str(ended)
    last = ended.err.rpartition("Rank 0 on")[2]
    assert re.search(where, last), f"nothing after the watcher's sentence\n{ended}"
    assert "Traceback (most recent call last)" in ended.err, "where rank 0 waited for it"
