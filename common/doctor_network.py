"""The doctor's checks of this machine's network: port, own name, interfaces, firewall rules."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.doctor_rows import Row, Subject, ask, finding, ok, unchecked
from common.interfaces import Interface, interfaces, is_loopback

LOOK_UP_S = 3.0


def port(subject: Subject) -> Row:
    """Whether 29500 and MASTER_PORT can be listened on."""
    if not subject.port and (text := subject.environment.get("MASTER_PORT")) != "0":
        return finding("port", f"MASTER_PORT={text} is no port", "unset MASTER_PORT")
    taken = {}
    for number in dict.fromkeys((subject.port, 29500)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", number))
                probe.listen(1)
            except OSError as error:
                taken[number] = error.strerror or str(error)
    if not taken:
        numbers = " and ".join(map(str, sorted({29500, subject.port} - {0})))
        return ok("port", f"{numbers} {'are' if ' ' in numbers else 'is'} free", port=subject.port)
    number = next(iter(taken))
    with socket.socket() as free:
        free.bind(("", 0))
        another = free.getsockname()[1]
    who = listener(number)
    told = f"{number} is taken{f' by {who}' if who else ''} ({taken[number]})"
    return finding("port", told, f"export MASTER_PORT={another} PET_MASTER_PORT={another}", port=number)


def listener(number: int) -> str:
    """Who listens on a TCP port: ``python x.py (pid 12)``; empty where that cannot be told."""
    inodes = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                fields = row.split()
                if int(fields[1].rpartition(":")[2], 16) == number and fields[3] == "0A":
                    inodes.add(f"socket:[{fields[9]}]")
    for folder in Path("/proc").glob("[0-9]*") if inodes else ():
        with contextlib.suppress(OSError):
            if any(os.readlink(f"/proc/{folder.name}/fd/{fd}") in inodes for fd in os.listdir(folder / "fd")):
                command = os.fsdecode((folder / "cmdline").read_bytes()).replace("\0", " ").strip()
                return f"{command[:60]} (pid {folder.name})"
    return ""


def resolve(name: str, limit: float = LOOK_UP_S) -> tuple[list[str], str]:
    """(addresses of ``name``, why there are none); it waits for a name server no longer than ``limit`` seconds."""
    found: list[str] = []
    why = [f"no answer within {limit:g} s"]

    def look_up() -> None:
        try:
            found.extend(dict.fromkeys(str(a[4][0]) for a in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)))
            why[0] = ""
        except (OSError, UnicodeError) as error:
            why[0] = getattr(error, "strerror", None) or str(error)

    thread = threading.Thread(target=look_up, daemon=True)  # a look-up cannot be ended; it is left to itself
    thread.start()
    thread.join(limit)
    return list(found), why[0]


def outward(here: list[Interface] | None = None) -> Interface | None:
    """The interface by which other machines would be reached: the default route's, else the first that is no loopback."""
    here = interfaces() if here is None else here
    usable = [i for i in here if not i.is_loopback and not i.one_link_only]
    with contextlib.suppress(OSError, IndexError, ValueError):
        rows = [row.split() for row in Path("/proc/net/route").read_text().splitlines()[1:]]
        default = next((row[0] for row in rows if row[1] == "00000000"), "")
        usable.sort(key=lambda i: i.name != default)
    usable.sort(key=lambda i: i.family != socket.AF_INET)
    return usable[0] if usable else None


def host_name(subject: Subject, name: str | None = None) -> Row:
    """Whether this machine's own name resolves, and to an address that other machines could use."""
    name = socket.gethostname() if name is None else name
    addresses, why = resolve(name)
    out = outward()
    if not addresses:
        entry = f"{out.address if out else '127.0.1.1'} {name}"
        told = f"this machine's own name {name} does not resolve ({why}): torchrun's rendezvous and gloo look it up"
        return finding("host name", told, f'echo "{entry}" | sudo tee -a /etc/hosts', name=name, addresses=[])
    if all(map(is_loopback, addresses)):
        told = f"{name} resolves to {', '.join(addresses)}, the loopback interface"
        if subject.several and out:
            told += ": bare torchrun with gloo hangs over several machines (connection refused 127.0.0.1)"
            return finding("host name", told, f"export GLOO_SOCKET_IFNAME={out.name}", name=name, addresses=addresses)
        return ok("host name", f"{told}; fine on one machine", name=name, addresses=addresses)
    return ok("host name", f"{name} resolves to {', '.join(addresses)}", name=name, addresses=addresses)


def interface(subject: Subject) -> Row:
    """Which interface ranks talk over, and whether the one that was asked for is there."""
    here = interfaces()
    names = list(dict.fromkeys(i.name for i in here))
    if hasattr(socket, "if_nameindex"):
        names = list(dict.fromkeys([*names, *(name for _, name in socket.if_nameindex())]))
    if not names:
        return unchecked("interface", "this system does not tell its interfaces")
    facts: dict[str, Any] = {"interfaces": [f"{i.name} {i.address}" for i in here]}
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        for wanted in filter(None, (word.strip() for word in subject.environment.get(variable, "").split(","))):
            if not _matches(variable, wanted, names):
                told = f"{variable}={wanted}: no such interface; this machine has {', '.join(names)}"
                return finding("interface", told, f"unset {variable}", **facts)
    out = outward(here)
    if subject.several and not out:
        told = f"no interface leads to other machines; this one has {', '.join(names)}"
        return finding("interface", told, "ip address   # then bring one up: sudo ip link set NAME up", **facts)
    given = subject.environment.get("GLOO_SOCKET_IFNAME")
    told = (
        f"lo between the ranks of one machine; {out.name} ({out.address}) to others" if out else "lo; none leads to other machines"
    )
    return ok("interface", f"GLOO_SOCKET_IFNAME={given} is there" if given else told, **facts)


def _matches(variable: str, wanted: str, names: list[str]) -> bool:
    """Of gloo's variable a name; NCCL takes a name; NCCL the beginning of one, ``=`` for a whole name, ``^`` for all but these."""
    if variable == "GLOO_SOCKET_IFNAME":
        return wanted in names
    whole = wanted.lstrip("^")
    if whole.startswith("="):
        return whole[1:] in names
    return wanted.startswith("^") or any(name.startswith(whole) for name in names)


def firewall(subject: Subject, rules: Mapping[str, str] | None = None) -> Row:
    """Whether this machine's rules keep others from its ports. ``rules``: what each program lists; asked by default."""
    if rules is None:
        rules, why = listed_rules(subject.environment)
        if not rules:
            return unchecked("firewall", why)
    closed = [verdict for program, text in rules.items() if (verdict := closes(program, text, subject.port))]
    if not closed:
        return ok("firewall", f"no rule keeps others out (by {', '.join(rules)})", rules=sorted(rules))
    told = f"{closed[0]}: gloo and NCCL need more ports than {subject.port or 29500}, any of them"
    if not subject.several:
        return ok("firewall", f"{told}; fine on one machine", closed=closed)
    return finding("firewall", told, open_line(neighbours(outward())), closed=closed)


def neighbours(out: Interface | None) -> str:
    """The network that is reached through ``out`` without a router: ``192.0.2.0/24``."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for row in (line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]):
            if out and row[0] == out.name and row[2] == "00000000" and row[1] != "00000000":
                net, mask = (int(row[k], 16).to_bytes(4, "little") for k in (1, 7))  # in network order on little-endian machines
                return f"{socket.inet_ntoa(net)}/{int.from_bytes(mask, 'big').bit_count()}"
    return out.address if out else "ADDRESS"


def open_line(subnet: str) -> str:
    """The command that lets machines of ``subnet`` in."""
    return f"sudo iptables -I INPUT -s {subnet} -p tcp -j ACCEPT"


def listed_rules(environment: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """(what iptables and nft list, why there is nothing)."""
    env = dict(environment) | {"PATH": f"{environment.get('PATH', os.defpath)}:/usr/sbin:/sbin"}
    found, why = {}, []
    for program, words in {"iptables": ["iptables", "-w", "2", "-S", "INPUT"], "nft": ["nft", "list", "ruleset"]}.items():
        answer = ask(["env", *words], limit=5, env=env)
        if answer.status == 0:
            found[program] = answer.out
        else:
            why.append(f"{program} {'is not installed' if answer.status == 127 else f'does not tell ({answer.last_line})'}")
    return found, "; ".join(why) + ("" if os.geteuid() == 0 else "; reading the rules needs root")


def closes(program: str, text: str, number: int = 29500) -> str:
    """What in the listed rules keeps unknown machines from TCP ports, ``number`` among them, in words; empty if nothing does."""
    if program == "iptables":
        for rule in text.splitlines():
            found = re.fullmatch(r"-A INPUT( -p tcp)?( -m tcp)?( --dport (?P<port>[\d:]+))? -j (?P<verdict>DROP|REJECT)\b.*", rule)
            if found and (not found["port"] or _covers(found["port"].replace(":", "-"), number)):
                return f"iptables: {rule}"
        return "iptables: -P INPUT DROP" if re.search(r"^-P INPUT (DROP|REJECT)", text, re.MULTILINE) else ""
    chain: list[str] = []
    for line in map(str.strip, text.splitlines()):
        chain = [*chain, line] if not line.startswith("chain ") else [line]
        if "hook input" not in " ".join(chain) or (line == "}" and not chain):
            continue
        found = re.fullmatch(
            r"((meta l4proto|ip protocol) tcp )?(tcp dport (?P<port>[\d-]+) )?"
            r"(counter( packets \d+ bytes \d+)? )?(drop|reject\b.*)",
            line,
        )
        if "policy drop" in line or (found and (not found["port"] or _covers(found["port"], number))):
            return f"nft: {line if found else 'an input chain with policy drop'}"
        if line == "}":
            chain = []
    return ""


def _covers(ports: str, number: int) -> bool:
    first, _, last = ports.partition("-")
    return int(first) <= number <= int(last or first)
