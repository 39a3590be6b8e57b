"""Commands side by side: whole lines behind names, statuses, failures, Ctrl-C and the lifeline."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.prefixed import run_prefixed

pytestmark = pytest.mark.launch  # it starts processes and waits for them

ROOT = Path(__file__).resolve().parents[2]
SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


def python(code):
    return [sys.executable, "-c", code]


def test_lines_stay_whole_and_have_their_name(capfd):
    code = "import sys\nfor k in range(300): sys.stdout.write('x' * 500); sys.stdout.flush(); sys.stdout.write(f' {k}\\n')"
    assert run_prefixed({"a": python(code), "bcd": python(code)}) == {"a": 0, "bcd": 0}
    out, err = capfd.readouterr()
    for prefix in ("[a]   ", "[bcd] "):
        assert [row for row in out.splitlines() if row.startswith(prefix)] == [f"{prefix}{'x' * 500} {k}" for k in range(300)]
    assert len(out.splitlines()) == 600 and err == ""


def test_streams_odd_ends_of_lines_and_bytes(capfdbinary):
    code = r"import os; os.write(1, b'10 %\r 50 %\r100 %\r\n\n\xff\xfe'); os.write(2, b'no end of line')"
    assert run_prefixed({"a": python(code)}) == {"a": 0}
    assert capfdbinary.readouterr() == (b"[a] 100 %\n[a] \n[a] \xff\xfe\n", b"[a] no end of line\n")


def test_statuses_in_the_order_of_ending(capfd):
    seen = []
    commands = {
        "slow": python("import time; time.sleep(1); exit(0)"),
        "three": python("exit(3)"),
        "killed": python("import os, time; time.sleep(0.5); os.kill(os.getpid(), 9)"),
        "gone": ["no-such-program"],
    }
    statuses = run_prefixed(commands, patience=None, ended=lambda *end: seen.append(end))
    assert list(statuses.items()) == seen == [("gone", 127), ("three", 3), ("killed", -9), ("slow", 0)]
    assert capfd.readouterr().err == "[gone]   no-such-program: No such file or directory\n"


def test_one_that_fails_ends_the_others(capfd):
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    began = time.monotonic()
    seen = []
    statuses = run_prefixed(
        {"bad": python("import time; time.sleep(1); exit(1)"), "good": SLEEP, "stubborn": python(stubborn)},
        patience=0.5, leave=1, ended=lambda *end: seen.append(end),
    )  # fmt: skip
    assert statuses == {"bad": 1, "good": -signal.SIGTERM, "stubborn": -signal.SIGKILL} and seen == [("bad", 1)]
    assert time.monotonic() - began < 20


def test_a_lifeline_ends_them_in_their_own_way_and_is_spoken_on(capfd):
    listens = "import sys, time; n = 0\nfor _ in sys.stdin: n += 1\nprint('words', n); print('late', file=sys.stderr); exit(7)"
    fails = "import time; time.sleep(2.5); exit(1)"
    statuses = run_prefixed({"": python(listens), "b": python(fails)}, lifeline=True, hush=True, patience=0.1)
    assert statuses == {"b": 1, "": 7}
    out, err = capfd.readouterr()
    assert 2 <= int(re.fullmatch(r"words (\d+)\n", out)[1]) <= 4 and err == "", "no name, no prefix; and nothing on stderr by then"


def test_who_leaves_something_running_is_not_waited_for(capfd):
    began = time.monotonic()
    code = f"import subprocess; subprocess.Popen({['sleep', '15']!r}); print('done')"
    assert run_prefixed({"a": python(code)}) == {"a": 0}
    assert capfd.readouterr().out == "[a] done\n" and time.monotonic() - began < 10


def caller():
    """A process that runs two commands, once both are up, and their pids."""
    child = python("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    source = f"from common.prefixed import run_prefixed; run_prefixed({{'a': {child!r}, 'b': {child!r}}})"
    process = subprocess.Popen(python(source), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    return process, [int(process.stdout.readline().split()[1]) for _ in range(2)]


def gone(pid):
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number, status", [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_are_passed_on(number, status):
    process, pids = caller()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status, err
    assert all(gone(pid) for pid in pids)


def test_a_reader_that_leaves_ends_all():
    code = "import time\nwhile True: print('x', flush=True); time.sleep(0.05)"
    source = f"from common.prefixed import run_prefixed; run_prefixed({{'a': {python(code)!r}}})"
    process = subprocess.Popen(python(source), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "[a] x\n"
    process.stdout.close()
    process.stdout = None
    assert process.communicate(timeout=30)[1] == "" and process.returncode == 141


def test_names_are_in_colour_on_a_terminal_only():
    source = f"from common.prefixed import run_prefixed; run_prefixed({{'a': {python('print(1)')!r}, 'b': {python('print(2)')!r}}})"

    def shown(**env):
        ours, theirs = pty.openpty()
        with subprocess.Popen(python(source), stdout=theirs, cwd=ROOT, env=os.environ | {"TERM": "xterm"} | env) as process:
            os.close(theirs)
            process.wait(30)
        text = os.read(ours, 4096).decode().replace("\r\n", "\n")
        os.close(ours)
        return sorted(text.splitlines())

    assert shown() == ["\033[33m[b] \033[0m2", "\033[36m[a] \033[0m1"]
    assert shown(NO_COLOR="1") == ["[a] 1", "[b] 2"]
