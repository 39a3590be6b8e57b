"""The guard with real processes: whoever its command leaves is ended, in whatever session, and its status comes back."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from common import remote_guard

pytestmark = [pytest.mark.launch, pytest.mark.only_on("linux")]
GUARD = [sys.executable, "-I", "-S", remote_guard.__file__]


def hasty(more=""):
    """The guard with less patience, so that the tests need less, too."""
    folder = str(Path(remote_guard.__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); import remote_guard as g; g.ALL_S, g.KILL_S = 0.5, 1.5; {more}"
    return [sys.executable, "-I", "-S", "-c", f"{code}sys.exit(g.main(sys.argv[1:]))"]


# A family as torchrun's: workers that lead sessions of their own, and a grandchild whose parent leaves at once.
FAMILY = """
import os, signal, subprocess, sys, time
deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " if "stubborn" in sys.argv else ""
sleep = [sys.executable, "-S", "-c", f"import os, signal, time; {deaf}os.write(1, b'up\\\\n'); time.sleep(120)"]
for _ in range(2):
    subprocess.Popen(sleep, start_new_session=True)
if not os.fork():
    os.setsid()
    if os.fork():
        time.sleep(2.5 if "late" in sys.argv else 0)
        os._exit(0)
    os.execv(sleep[0], sleep)
os.wait()
if "leave" in sys.argv:
    time.sleep(0.5)
    sys.exit(5)
if "die" in sys.argv:
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(120)
"""


class Guarded:
    """A guard with a family, and all of its processes by a variable that they inherit."""

    def __init__(self, tmp_path, *words, guard=None):
        self.mark = f"GUARD_TEST={tmp_path}"
        file = tmp_path / "family.py"
        file.write_text(FAMILY)
        self.process = subprocess.Popen(
            [*(guard or hasty()), sys.executable, "-S", str(file), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"GUARD_TEST": str(tmp_path)},
            start_new_session=True,
        )
        assert [self.process.stdout.readline() for _ in range(3)] == [b"up\n"] * 3

    def left(self):
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("GUARD_TEST") == self.mark.partition("=")[2] and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                pass
        return found

    def ends(self, seconds):
        """(status, stderr) once it has ended, with nothing left."""
        try:
            status = self.process.wait(seconds)
            assert self.left() == []
            return status, self.process.stderr.read().decode()
        finally:
            for process in self.left():
                process.kill()
            for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
                pipe.close()


def test_the_end_of_its_input_ends_the_family(tmp_path):
    guarded = Guarded(tmp_path, guard=GUARD)
    assert len(guarded.left()) == 5
    guarded.process.stdin.close()
    assert guarded.ends(15)[0] == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_does_too(tmp_path, number):
    guarded = Guarded(tmp_path)
    guarded.process.send_signal(number)
    status, _ = guarded.ends(15)
    assert status in ((1, 130) if number == signal.SIGINT else (128 + number,))  # Python's own way to end after SIGINT


def test_those_that_ignore_sigterm_end_too(tmp_path):
    guarded = Guarded(tmp_path, "stubborn")
    began = time.monotonic()
    guarded.process.terminate()
    guarded.ends(20)
    assert 1.4 < time.monotonic() - began < 10
    assert remote_guard.KILL_S == 8, "in earnest"


@pytest.mark.parametrize("how, status, said", [
    ("leave", 5, ""),
    ("die", 137, "remote_guard.py: the command was killed by SIGKILL; ending what it has left.\n"),
])  # fmt: skip
def test_the_command_ends_and_its_family_with_it(tmp_path, how, status, said):
    assert Guarded(tmp_path, how).ends(15) == (status, said)


def test_a_caller_that_falls_silent(tmp_path):
    guarded = Guarded(tmp_path, guard=[*hasty("g.LOOK_S = 0.2; "), "--silence", "1.5"])
    for _ in range(5):
        time.sleep(0.5)
        guarded.process.stdin.write(b"\n")
        guarded.process.stdin.flush()
    assert guarded.process.poll() is None, "it was spoken to"
    began = time.monotonic()
    assert guarded.ends(15)[0] == 128 + signal.SIGTERM
    assert time.monotonic() - began > 1


def test_where_orphans_are_not_adopted(tmp_path):
    """As on macOS: the family is remembered from the process table, here ps's."""
    guard = hasty("g.LOOK_S = 0.3; g.adopt_orphans = lambda: False; g._from_proc = g._from_ps; ")
    guarded = Guarded(tmp_path, "late", guard=guard)
    time.sleep(4)  # the grandchild has lost its parent by now
    guarded.process.terminate()
    assert guarded.ends(15)[0] == 128 + signal.SIGTERM


def test_if_the_guard_is_killed_its_command_is_asked_to_end(tmp_path):
    asked = "signal.signal(signal.SIGTERM, lambda *_: (open('asked', 'w').close(), exit()))"
    code = f"import signal, time; {asked}; print(1, flush=True); time.sleep(60)"
    with subprocess.Popen(
        [*GUARD, sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
    ) as guard:
        assert guard.stdout.readline() == b"1\n"
        guard.kill()
        until = time.monotonic() + 10
        while not (tmp_path / "asked").exists():
            assert time.monotonic() < until
            time.sleep(0.05)


@pytest.mark.parametrize(
    "words, status", [(["no-such-program"], 127), (["/etc/passwd"], 126), (["sh", "-c", "exit 3"], 3), ([], 2)]
)
def test_statuses(words, status):
    ended = subprocess.run([*GUARD, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    assert ended.returncode == status, ended
    assert (": " in ended.stderr and ended.stderr.count("\n") == 1) == (status != 3), ended


def test_an_input_that_is_empty_from_the_start_is_no_reason_to_end():
    """/dev/null and files: only a pipe or a socket is a line to somebody."""
    words = [*GUARD, "sh", "-c", "sleep 0.5; echo done"]
    assert subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30).stdout == "done\n"
