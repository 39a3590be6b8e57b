"""Real child processes with a time limit, ended with their whole group; refusals."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]


def environment(**variables):
    """This process's environment with the repository on the module path."""
    return os.environ | {"PYTHONPATH": str(ROOT)} | variables


def start(argv, **options):
    """A child in a session of its own, its output piped."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()} | options
    return subprocess.Popen(argv, start_new_session=True, **options)


def end_group(child):
    """Kills what is left of a child's group, and reaps the child."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait(10)
    for stream in (child.stdout, child.stderr, child.stdin):
        if stream:
            with contextlib.suppress(BrokenPipeError):  # what was still to be written to it
                stream.close()


def run(argv, limit=30, **options):
    """Runs a command to its end: (status, stdout, stderr)."""
    child = start(argv, **options)
    try:
        out, err = child.communicate(timeout=limit)
        return child.returncode, out, err
    finally:
        end_group(child)


def python(code, *arguments, **options):
    """Runs a piece of Python with the repository on the module path."""
    return run([sys.executable, "-c", code, *arguments], **options)


def until(condition, limit=5.0):
    """Waits for a condition; whether it came true in time."""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def refusal(call, *arguments, **named):
    """The text of the UsageError that a call raises: always one line."""
    with pytest.raises(UsageError) as caught:
        call(*arguments, **named)
    text = str(caught.value)
    assert text and len(text.splitlines()) == 1
    return text
