"""Small processes that report to a watcher as ranks do."""

import contextlib
import json
import os
import re
import sys
import uuid
from pathlib import Path

from common import reporter
from tests.common.helpers import ROOT, start, until

CHILD = f"""
import json, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from common.reporter import Reporter
key, about, code = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
reporter = Reporter(key, about)
print("here", flush=True)
while (line := sys.stdin.readline()) and line != "go\\n":
    exec(line)
exec(code)
"""
SLEEP = "time.sleep(60)"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
DONE = "reporter.tell(event='done'); reporter.close()"
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
ASKED_TO_LEAVE = "os.kill(os.getpid(), signal.SIGTERM)"


def failing(event, cause, first=0.0):
    return f"time.sleep({first}); heard = reporter.ask(event={event!r}, cause={cause!r}); sys.exit(1 if heard else 99)"


def watchers(key):
    """Whether this key's watcher still holds its name."""
    return key_address(key).encode() in Path("/proc/net/unix").read_bytes()


def key_address(key):
    import hashlib

    key += os.readlink("/proc/self/ns/pid")
    return f"@launchlab-{os.getuid()}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def watcher_of(ranks):
    """(pid, session) of the processes that run watch.py and were started by one of these ranks."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if reporter.PROGRAM.encode() in argv and int(fields[1]) in {rank.pid for rank in ranks}:
                found.append((int(pid), int(fields[3])))
    return found


def holds(pid, ranks):
    """Whether a watcher holds a pidfd of each of these ranks."""
    with contextlib.suppress(OSError):
        held = " ".join(path.read_text() for path in Path(f"/proc/{pid}/fdinfo").iterdir())
        return {str(rank.pid) for rank in ranks} <= set(re.findall(r"\bPid:\t(\d+)", held))
    return False


class Run:
    """The ranks of one run on this node, each a small process."""

    def __init__(self, folder, *codes, parent=0, key=None, watched=True, host="here", first=0, **about):
        self.key = key or uuid.uuid4().hex
        self.log = folder / f"{uuid.uuid4().hex}.err"
        self.ranks = []
        with self.log.open("wb") as log:
            for rank, code in enumerate(codes, first):
                told = json.dumps({"rank": rank, "host": host, "parents": [parent] * bool(parent)} | about)
                argv = [sys.executable, "-I", "-S", "-c", CHILD, self.key, told, code]
                self.ranks.append(start(argv, stdin=-1, stderr=log))
        for rank in self.ranks:
            assert rank.stdout.readline() == "here\n"
        if watched and not parent:  # with one that may be gone already, the watcher may have done its work by now
            assert until(lambda: watcher_of(self.ranks))
            ((self.watcher, self.session),) = watcher_of(self.ranks)
            assert until(lambda: holds(self.watcher, self.ranks))

    def do(self, index, line):
        """Has a rank carry out a line of Python."""
        with contextlib.suppress(BrokenPipeError):  # ended already
            self.ranks[index].stdin.write(f"{line}\n")
            self.ranks[index].stdin.flush()

    def go(self, *which):
        for index in which or range(len(self.ranks)):
            self.do(index, "go")

    def statuses(self, limit=10):
        """How all ended; the watcher must have left soon after."""
        ended = [rank.wait(limit) for rank in self.ranks]
        assert until(lambda: not watchers(self.key)), "the watcher stayed"
        return ended

    def said(self):
        return self.log.read_text()
