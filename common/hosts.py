"""Host files, read as Open MPI and MPICH read theirs, and how ssh reaches a host of one.

    # comment                  to the end of the line
    lab1                       Open MPI and MPICH
    lab1 slots=2 max_slots=4   Open MPI (https://docs.open-mpi.org/en/main/launching-apps/scheduling.html)
    lab1:2                     MPICH
    alice@lab1 port=2222       Open MPI;  user=alice: both
    [fd00::1]:2                an IPv6 address in brackets
A host that is named twice has the slots of both lines.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UsageError
from common.values import whole

# Open MPI's words (prrte's hostfile_lex.l) and MPICH's (hydra's user=, binding=) → ours; "" for what is theirs alone.
KEYS = {
    **dict.fromkeys(("slots", "slot", "cpu", "cpus", "count"), "slots"),
    **dict.fromkeys(("max_slots", "max-slots", "maxslots", "slots_max", "slots-max"), "most"),
    "user": "user",
    "username": "user",
    "port": "port",
    "binding": "",
}
ALLOWED = "a name, name:SLOTS or [IPv6], then any of slots=N, max_slots=N, user=NAME, port=N"
SSH_OPTIONS = {
    "BatchMode": "yes",  # a question for a password would wait for ever
    "ConnectTimeout": "10",
    "ServerAliveInterval": "3",  # seconds; after three without an answer ssh gives up
    "ServerAliveCountMax": "2",
    "ClearAllForwardings": "yes",
    "LogLevel": "ERROR",
}


@dataclass(frozen=True)
class Host:
    """One host of a hosts file."""

    name: str
    """Host name or address as ssh takes it; IPv6 without brackets."""
    user: str | None = None
    port: int | None = None
    """Of its sshd."""
    slots: int | None = None
    """Ranks to start there; None: not said."""
    line: int = 0
    """Of the file, from 1; 0: from the command line."""

    @property
    def label(self) -> str:
        """What it is called in messages and before its output."""
        return self.name if self.port is None else f"{self.name} port {self.port}"

    def ssh(self, command: str, ssh: Sequence[str] = ("ssh",)) -> list[str]:
        """The words that run ``command`` (for the shell there) on this host; options given in ``ssh`` outrank ours."""
        options = [word for name, value in SSH_OPTIONS.items() for word in ("-o", f"{name}={value}")]
        port = [] if self.port is None else ["-p", str(self.port)]
        return [*ssh, *options, "-T", *port, "--", f"{self.user}@{self.name}" if self.user else self.name, command]


def _number(key: str, text: str, highest: int | None = None) -> int:
    try:
        return whole(1, highest)(text)
    except ValueError as allowed:
        raise ValueError(f"{key}={text} is not allowed: give {allowed}") from None


def _name(text: str) -> tuple[str, str]:
    """(name or address, slots or "") from ``lab1``, ``lab1:2``, ``[fd00::1]`` or ``[fd00::1]:2``."""
    if found := re.fullmatch(r"\[([^][]+)\](?::(.*))?", text):
        name, slots = found[1], found[2]
        try:
            ipaddress.IPv6Address(name)
        except ValueError:
            raise ValueError(f"[{name}] is no IPv6 address") from None
    elif text.count(":") > 1:
        raise ValueError(f"{text}: an IPv6 address stands in brackets, [{text}]")
    else:
        name, colon, slots = text.partition(":")
        slots = slots if colon else None
        if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,251}[A-Za-z0-9_.])?", name):
            raise ValueError(f"{name or text!r} is no host name")
    if slots == "":
        raise ValueError(f"{text}: slots are missing after the colon")
    return name, slots or ""


def parse_host(text: str, line: int = 0) -> Host:
    """The host that one line of a hosts file, without its comment, or a word of the command line describes.

    Raises:
        ValueError: it describes none; its text says what is wrong.
    """
    first, *rest = re.sub(r"\s*=\s*", "=", text.strip()).split()
    *users, place = first.split("@") if first.count("@") <= 1 else [*first.rsplit("@", 1)]
    name, slots = _name(place)
    found: dict[str, str] = {key: value for key, value in (("slots", slots), ("user", "".join(users))) if value}
    if users and not users[0]:
        raise ValueError(f"{first}: the user is missing before the @")
    for word in rest:
        key, equals, value = word.partition("=")
        if not equals or key.lower() not in KEYS:
            raise ValueError(f"{word!r} is not known here")
        ours = KEYS[key.lower()]
        if ours and found.setdefault(ours, value) != value:
            raise ValueError(f"{ours} is given twice, {found[ours]} and {value}")
    most = _number("max_slots", found["most"]) if "most" in found else None
    given = _number("slots", found["slots"]) if "slots" in found else most  # Open MPI: the limit is the default
    if most and given and most < given:
        raise ValueError(f"slots={given} is more than max_slots={most}")
    user = found.get("user")
    if user is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._\\@$-]*", user):
        raise ValueError(f"{user!r} is no user name")
    return Host(name, user, _number("port", found["port"], 65535) if "port" in found else None, given, line)


def merged(hosts: Iterable[Host]) -> list[Host]:
    """Each host once, in the order of first mention; one that is named again has the slots of both (one where it says none).

    Raises:
        ValueError: under two users.
    """
    found: dict[tuple[str, int | None], Host] = {}
    for host in hosts:
        first = found.get((host.name, host.port))
        if first is None:
            found[host.name, host.port] = host
        elif first.user != host.user:
            raise ValueError(f"{host.name} is named twice, with user {first.user or '(none)'} and {host.user or '(none)'}")
        else:
            found[host.name, host.port] = dataclasses.replace(first, slots=(first.slots or 1) + (host.slots or 1))
    return list(found.values())


def read_hosts(path: str | Path) -> list[Host]:
    """The hosts of a file, each once.

    Raises:
        UsageError: it cannot be read, names no host, or has a line that is none (its number is told).
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no text file"
        raise UsageError(f"{path}: cannot be read ({why}); write one host a line into it, as hosts.example.txt shows") from None
    hosts: list[Host] = []
    for number, row in enumerate(text.splitlines(), 1):
        content = row.partition("#")[0].strip()
        try:
            if content:
                hosts = merged([*hosts, parse_host(content, number)])
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: {error}; a line is {ALLOWED}") from None
    if not hosts:
        raise UsageError(f"{path}: names no host; write one a line, as hosts.example.txt shows")
    return hosts


def hosts_from(words: Sequence[str], flag: str) -> list[Host]:
    """The hosts that words of the command line name, as in a file.

    Raises:
        UsageError: one of them names none.
    """
    try:
        return merged(parse_host(word) for word in words if word.strip())
    except ValueError as error:
        raise UsageError(f"{flag} {' '.join(words)}: {error}; a host is {ALLOWED}") from None


def shell_line(words: Sequence[str], folder: str | Path, variables: dict[str, str] | None = None) -> str:
    """``words`` as one line for any shell (sh, csh, fish), run in ``folder`` with ``variables`` set; everything is quoted."""
    env = ["env", *(f"{name}={value}" for name, value in variables.items())] if variables else []
    return f"cd {shlex.quote(str(folder))} && exec {shlex.join([*env, *words])}"
