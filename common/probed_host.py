"""A host with ``common/host_probe.py`` running on it, asked through one ssh connection; and what to do where ssh leads nowhere."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import host_probe
from common.hosts import Host

# Isolated by hand, because -I would leave out packages that a user has installed for herself.
BOOT = (
    "import sys; sys.path.pop(0); "
    "sys.exit('Python %d.%d is too old: 3.10 or newer is needed' % sys.version_info[:2]) if sys.version_info < (3, 10) "
    "else exec(sys.stdin.buffer.read(int(sys.argv[1])))"
)
NO_ANSWER = "no answer"
_START = "sudo systemctl start ssh   # on {name}; then: ssh {host} true"
# What ssh says → what to do, and the command for it. {host}: to type after ssh; {name}: the host.
SSH_SAYS = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is not the one known here; if you know why: ssh-keygen -R {name}",
        "ssh-keygen -R {name}   # if you know why it has changed",
    ),
    (
        "Host key verification failed",
        "its host key is not known here: ssh {host} once, look at it and say yes",
        "ssh {host}   # look at its key, and say yes",
    ),
    (
        "Permission denied",
        "it lets in none of the keys offered: ssh-copy-id {host}, or name the key in ~/.ssh/config",
        "ssh-copy-id {host}",
    ),
    (
        "Too many authentication failures",
        "it lets in none of the keys offered: name the right one in ~/.ssh/config",
        "ssh-copy-id {host}",
    ),
    (
        "Could not resolve hostname",
        "nobody knows this name: mend it in the hosts file, or add it to /etc/hosts or ~/.ssh/config",
        'echo "ADDRESS {name}" | sudo tee -a /etc/hosts',
    ),
    (
        "Connection refused",
        "no sshd answers there: start it (apt install openssh-server), or give its port in the hosts file",
        _START,
    ),
    ("timed out", "it does not answer: is it on, is the name right, does a firewall drop port {port}?", _START),
    ("No route to host", "no route leads there: is it on, and on this network?", _START),
    ("Network is unreachable", "no route leads there: is this machine on the network?", _START),
    ("Bad owner or permissions", "ssh refuses its own configuration: chmod 600 the file that it names", _START),
    ("", "", _START),
)


class Silent(Exception):
    """A host that gave no answer; the text is the last that was said about it."""

    def __init__(self, why: str, said: str = "", status: int | None = None) -> None:
        """``said``: all that came on stderr; ``status``: of its ssh, None while that runs."""
        super().__init__(why)
        self.said, self.status = said, status

    @property
    def no_python(self) -> bool:
        """Whether a shell there did not find the interpreter."""
        return self.status in (126, 127)

    def remedy(self, host: Host) -> tuple[str, str]:
        """What to do, where ssh itself has said why (else ""), and a command for it."""
        target = f"{host.user}@{host.name}" if host.user else host.name
        names = {"host": f"-p {host.port} {target}" if host.port else target, "name": host.name, "port": host.port or 22}
        said = self.said if self.status == 255 else ""
        remedy, command = next((remedy, command) for words, remedy, command in SSH_SAYS if words in said)
        return remedy.format(**names), command.format(**names)


class ProbedHost:
    """``host_probe`` on a host."""

    def __init__(self, host: Host, python: str, ssh: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Starts it.

        Args:
            host: where.
            python: the interpreter there.
            ssh: the command, with options.
            environment: ssh's.
        """
        source = Path(host_probe.__file__).read_bytes()
        self._rest = b""
        self._process: subprocess.Popen[bytes] | None = None
        self._error = ""
        try:
            self._process = subprocess.Popen(
                host.ssh(f"exec {shlex.join([python, '-c', BOOT, str(len(source))])}", ssh),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C is this process's to hear
            )
        except OSError as error:
            self._error = f"{ssh[0]} cannot be started ({error.strerror}): apt install openssh-client"
        else:
            self._send(source)

    def _send(self, data: bytes) -> None:
        assert self._process and self._process.stdin
        with contextlib.suppress(OSError):  # the answer will be missing, and say why
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def ask(self, what: str, limit: float = 10.0, **question: Any) -> Any:
        """The answer to one question.

        Raises:
            Silent: there is none within ``limit`` seconds; the host is then let go.
        """
        if not self._process:
            raise Silent(self._error)
        assert self._process.stdout
        self._send(json.dumps({"ask": what, **question}).encode() + b"\n")
        until = time.monotonic() + limit
        while True:
            line, newline, rest = self._rest.partition(b"\n")
            if newline:
                self._rest = rest
                if line.startswith(host_probe.MARK.encode()):
                    return json.loads(line[len(host_probe.MARK) :])
                continue
            if not select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                self._kill()
                raise Silent(NO_ANSWER)
            if not (data := os.read(self._process.stdout.fileno(), 1 << 16)):
                raise self._ended()
            self._rest += data

    def _kill(self) -> None:
        assert self._process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with what ssh has started: a ProxyCommand holds the pipes too

    def _ended(self) -> Silent:
        assert self._process and self._process.stderr
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2)
        os.set_blocking(self._process.stderr.fileno(), False)  # what ssh has started may hold it
        said = (self._process.stderr.read() or b"").decode(errors="replace").strip()
        status = self._process.poll()
        return Silent(said.splitlines()[-1].strip()[:200] if said else f"its ssh ended with status {status}", said, status)

    def ahead(self, turns: int = 1, limit: float = 10.0) -> tuple[float, float]:
        """Its clock against this machine's, and how long the answer took that told, in seconds; of ``turns`` the quickest counts.

        The answer was given between asking and hearing it, so the error is at most half that time (Cristian 1989).

        Raises:
            Silent: no answer.
        """
        found = []
        for _ in range(turns):
            asked = time.time()
            theirs = self.ask("time", limit)
            heard = time.time()
            found.append((heard - asked, theirs - (asked + heard) / 2))
        round_trip, offset = min(found)
        return offset, round_trip

    def close(self) -> None:
        """Lets the host go; who still waits for its answer gets none."""
        if not (process := self._process):
            return
        with contextlib.suppress(OSError):
            assert process.stdin
            process.stdin.close()
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            self._kill()
            process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()
