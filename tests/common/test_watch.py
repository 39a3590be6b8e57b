"""watch.py and endings.py with real processes: who failed, what is said, and that nothing is left."""

import os
import re
import signal
import socket
import sys
import time
import uuid
from pathlib import Path

import pytest

from common import reporter
from common.endings import lost_a_peer, watched
from common.errors import RunError, UsageError
from common.rank import Rank
from tests.common.helpers import ROOT, end_group, start, until
from tests.common.watching import ASKED_TO_LEAVE, DEAF, DONE, KILLED, SLEEP, Run, failing, key_address, watcher_of, watchers

pytestmark = pytest.mark.launch  # it starts processes and waits for them
linux = pytest.mark.skipif(sys.platform != "linux", reason="the watcher needs pidfds")

# Before Linux 6.16 nothing tells how a process ended that was reaped before the watcher was up.
TOLD_AFTERWARDS = sys.platform == "linux" and tuple(int(n) for n in os.uname().release.split(".")[:2]) >= (6, 16)


@pytest.fixture
def begin(tmp_path):
    """Starts runs, and ends what is left of them."""
    runs = []

    def make(*codes, **options):
        runs.append(Run(tmp_path, *codes, **options))
        return runs[-1]

    yield make
    for run in runs:
        for rank in run.ranks:
            end_group(rank)


@linux
@pytest.mark.parametrize(
    ("code", "said"),
    [
        (KILLED, "was killed by SIGKILL"),
        ("os._exit(3)", "ended with exit status 3 before its work was done"),
        ("os._exit(0)", "ended with exit status 0 before its work was done"),
        ("sys.exit(7)", "ended with exit status 7 before its work was done"),
    ],
)
def test_the_rank_that_dies_is_named_and_the_others_are_ended(begin, code, said):
    run = begin(SLEEP, code, SLEEP)
    began = time.monotonic()
    run.go()
    statuses = run.statuses()
    assert time.monotonic() - began < 5
    assert statuses[0] == statuses[2] == -signal.SIGTERM
    assert run.said() == f"Rank 1 on here (pid {run.ranks[1].pid}) {said}; ending the other 2 ranks here.\n"


@linux
def test_ranks_that_ignore_sigterm_are_ended_within_5_seconds(begin):
    run = begin(KILLED, DEAF, DEAF)
    run.go(1, 2)
    time.sleep(0.3)
    began = time.monotonic()
    run.go(0)
    assert run.statuses() == [-signal.SIGKILL] * 3
    assert time.monotonic() - began < 5
    assert run.said().count("\n") == 1 and run.said().startswith("Rank 0 on here")


@linux
def test_the_cause_wins_over_a_peer_that_noticed_first(begin):
    run = begin(failing("lost a peer", "lost another rank: closed"), failing("failed", "failed: it broke", 0.15), SLEEP)
    run.go()
    assert run.statuses()[:2] == [1, 1]
    assert run.said() == f"Rank 1 on here (pid {run.ranks[1].pid}) failed: it broke; ending the other 2 ranks here.\n"


@linux
def test_a_death_wins_over_a_peer_that_noticed_first(begin):
    run = begin(failing("lost a peer", "lost another rank: closed"), f"time.sleep(0.1); {KILLED}")
    run.go()
    assert run.statuses() == [1, -signal.SIGKILL]
    assert f"Rank 1 on here (pid {run.ranks[1].pid}) was killed by SIGKILL" in run.said() and "lost" not in run.said()


@linux
def test_a_lost_peer_alone_is_told(begin):
    run = begin(failing("lost a peer", "lost another rank: closed"), SLEEP)
    run.go()
    assert run.statuses()[0] == 1
    assert run.said().endswith("lost another rank: closed; ending the other 1 rank here.\n")


@linux
def test_of_two_failures_the_first_is_told_with_its_traceback(begin):
    traced = "reporter.ask(event='failed', cause='failed: one', traceback='Traceback: line 1\\n'); sys.exit(1)"
    run = begin(traced, failing("failed", "failed: two", 0.15))
    run.go()
    first, second = run.statuses()
    assert first == 1 and second in (1, -signal.SIGTERM)  # it may be asked to end before it has spoken
    assert run.said().startswith("Traceback: line 1\nRank 0 on here") and "two" not in run.said()


@linux
def test_a_refusal_of_all_is_told_once(begin):
    run = begin(*[failing("refused", "--epochs 0: no")] * 3)
    run.go()
    assert run.statuses() == [1, 1, 1] and run.said() == "error: --epochs 0: no\n"


@linux
def test_an_interruption_is_silent_but_ends_the_others(begin):
    run = begin(failing("interrupted", "was interrupted"), SLEEP)
    run.go()
    assert run.statuses() == [1, -signal.SIGTERM] and run.said() == ""


@linux
def test_a_normal_end_is_silent(begin):
    run = begin(DONE, f"time.sleep(0.3); {DONE}", f"{DONE}; time.sleep(0.2)")
    run.go()
    assert run.statuses() == [0, 0, 0] and run.said() == ""


@linux
def test_a_rank_that_is_done_may_end_as_it_likes(begin):
    run = begin(f"{DONE}; os._exit(4)", f"time.sleep(0.5); {DONE}")
    run.go()
    assert run.statuses() == [4, 0] and run.said() == ""


@linux
def test_a_failure_is_heard_at_the_latest_when_the_time_to_settle_is_over(begin):
    run = begin("began = time.monotonic(); " + failing("failed", "failed: x") + "", SLEEP)
    began = time.monotonic()
    run.go()
    assert run.ranks[0].wait(5) == 1 and time.monotonic() - began < reporter.REPLY_S
    run.statuses()


@linux
def test_the_launcher_s_end_ends_its_ranks(begin):
    launcher = start([sys.executable, "-I", "-S", "-c", SLEEP.replace("time", "__import__('time')", 1)])
    try:
        run = begin(SLEEP, DEAF, parent=launcher.pid)
        run.go()
        assert watchers(run.key)
    finally:
        end_group(launcher)
    began = time.monotonic()
    run.statuses()
    assert time.monotonic() - began < 5
    assert run.said() == "Watch: the launcher that started this node's ranks is gone; ending the other 2 ranks here.\n"


@linux
def test_a_launcher_that_is_gone_before_the_ranks_arrive_ends_them(begin):
    launcher = start([sys.executable, "-I", "-S", "-c", "pass"])
    launcher.wait(10)
    end_group(launcher)
    run = begin(SLEEP, SLEEP, parent=launcher.pid)
    run.go()
    assert run.statuses() == [-signal.SIGTERM] * 2
    assert "the launcher that started this node's ranks is gone" in run.said()


@linux
def test_the_launcher_s_end_after_the_work_is_no_failure(begin):
    launcher = start([sys.executable, "-I", "-S", "-c", SLEEP.replace("time", "__import__('time')", 1)])
    try:
        run = begin(*[f"{DONE}; print('told', flush=True); time.sleep(0.5)"] * 2, parent=launcher.pid)
        run.go()
        for rank in run.ranks:
            assert rank.stdout.readline() == "told\n"
    finally:
        end_group(launcher)
    assert run.statuses() == [0, 0] and run.said() == ""


@linux
def test_runs_with_keys_of_their_own_do_not_see_each_other(begin):
    one, two = begin(KILLED, SLEEP), begin(SLEEP, f"time.sleep(1.5); {DONE}")
    two.go(1)  # rank 0 still waits for its word
    one.go()
    assert one.statuses() == [-signal.SIGKILL, -signal.SIGTERM]
    assert two.ranks[1].wait(5) == 0 and two.ranks[0].poll() is None and two.said() == ""
    two.ranks[0].kill()
    two.statuses()


@linux
def test_a_key_may_be_long(begin):
    run = begin(KILLED, SLEEP, key="node-0." + "a-long-name." * 18 + f"example:29500/{uuid.uuid4()}/0/0")
    run.go()
    assert run.statuses() == [-signal.SIGKILL, -signal.SIGTERM] and "Rank 0" in run.said()


@linux
def test_the_watcher_is_one_process_in_a_session_of_its_own(begin):
    run = begin(DONE, DONE, DONE)
    assert watcher_of(run.ranks) == [(run.watcher, run.watcher)] and run.session == run.watcher
    run.go()
    assert run.statuses() == [0, 0, 0]
    assert until(lambda: not Path(f"/proc/{run.watcher}").exists())


def late_watcher(run, listener):
    """Starts the watcher of a run by hand, as its first rank does."""
    argv = [sys.executable, "-I", "-S", reporter.PROGRAM, str(listener.fileno())]
    with run.log.open("ab") as log:
        return start(argv, pass_fds=[listener.fileno()], stderr=log)


@linux
@pytest.mark.parametrize("codes", [(KILLED, SLEEP), (KILLED, KILLED), (ASKED_TO_LEAVE, KILLED), (DONE, DONE)])
def test_ranks_that_are_gone_before_the_watcher_is_up_are_not_forgotten(begin, codes):
    key = uuid.uuid4().hex
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0" + key_address(key)[1:])
        listener.listen()
        run = begin(*codes, key=key, watched=False)
        run.go()
        for rank, code in zip(run.ranks, codes, strict=True):
            if code != SLEEP:
                rank.wait(10)  # reaped: its process id means nothing any more
        watcher = late_watcher(run, listener)
    try:
        run.statuses()
        assert watcher.wait(5) == 0
    finally:
        end_group(watcher)
    assert (" on here (pid " in run.said()) == (codes != (DONE, DONE))
    if codes != (DONE, DONE) and TOLD_AFTERWARDS:  # the launcher may have asked the others to leave by then
        assert " was killed by SIGKILL" in run.said()
        assert codes != (ASKED_TO_LEAVE, KILLED) or "Rank 1 on here" in run.said()


@linux
def test_a_watcher_whose_rank_died_before_it_connected_leaves(tmp_path):
    """The rank is killed between starting the watcher and its first word, as a launcher may that ends all."""
    key = uuid.uuid4().hex
    code = f"""
import os, socket, subprocess, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind("\\0" + {key_address(key)[1:]!r})
listener.listen()
subprocess.Popen([sys.executable, "-I", "-S", {reporter.PROGRAM!r}, str(listener.fileno())], pass_fds=[listener.fileno()],
                 stdout=-3, start_new_session=True)
os._exit(0)
"""
    rank = start([sys.executable, "-I", "-S", "-c", code])
    try:
        assert rank.wait(10) == 0
        assert until(lambda: not watchers(key))
    finally:
        end_group(rank)


@linux
def test_a_rank_whose_watcher_is_gone_goes_on_and_knows():
    """Nobody listens: telling does no harm, and a failed rank learns that it must speak for itself."""
    mine, other = socket.socketpair()
    other.close()
    rank = reporter.Reporter.__new__(reporter.Reporter)
    rank._socket = mine
    rank.tell(event="done")
    assert rank.ask(event="failed", cause="x") is None
    rank.close()


# ------------------------------------------------------------------------------------------- without a watcher


def ending(error):
    """What a process on its own raises after ``error``."""
    try:
        with watched(Rank("test")):
            raise error
    except BaseException as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (RunError("ranks 1, 2 are missing"), 1, r"Rank 0 on \S+ \(pid \d+\) failed: ranks 1, 2 are missing\.\n"),
        (SystemExit(4), 1, r"Rank 0 on \S+ \(pid \d+\) left with exit status 4 before its work was done\.\n"),
        (
            ValueError("it broke\nbadly"),
            1,
            r"(?s)Traceback .*ValueError: it broke\nbadly\nRank 0 on .* failed: ValueError: it broke\.\n",
        ),
        (
            RuntimeError("Connection closed by peer [::1]"),
            1,
            r"Rank 0 on .* lost another rank: RuntimeError: Connection closed.*\.\n",
        ),
    ],
)
def test_a_process_on_its_own_tells_of_its_failure(capfd, error, status, said):
    raised = ending(error)
    assert isinstance(raised, SystemExit) and raised.code == status
    assert re.fullmatch(said, capfd.readouterr().err)


@pytest.mark.parametrize("error", [UsageError("--epochs 0: no"), KeyboardInterrupt()])
def test_a_refusal_and_ctrl_c_go_on_as_they_came(capfd, error):
    assert ending(error) is error
    assert capfd.readouterr().err == ""


def test_a_good_end_is_silent(capfd):
    with watched(Rank("test")):
        pass
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo] Connection reset by peer"), True),
        (RuntimeError("Timed out waiting 60000ms for recv operation"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("connection closed by peer"), False),
    ],
)
def test_which_errors_come_from_a_dead_peer(error, lost):
    assert lost_a_peer(error) is lost


@linux
@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("pass", 0, r""),
        ("raise UsageError('--epochs 0: no')", 2, r"error: --epochs 0: no\n"),
        ("raise RunError('why')", 1, r"Rank 0 on \S+ \(pid \d+\) failed: why\.\n"),
        ("raise KeyError('k')", 1, r"(?s)Traceback .*Rank 0 on \S+ \(pid \d+\) failed: KeyError: 'k'\.\n"),
    ],
)
def test_among_several_ranks_the_watcher_tells_and_once(tmp_path, code, status, said):
    text = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from common.endings import watched
from common.errors import RunError, UsageError, exit_status
from common.rank import Rank
def main():
    with watched(Rank("test", 0, 2, 0, 2, 0, {uuid.uuid4().hex!r}, 1)):
        {code}
sys.exit(exit_status(main))
"""
    with (tmp_path / "err").open("wb") as log:
        child = start([sys.executable, "-I", "-S", "-c", text], stderr=log)
        try:
            assert child.wait(10) == status
        finally:
            end_group(child)
    assert re.fullmatch(said, (tmp_path / "err").read_text())
