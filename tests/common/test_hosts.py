"""Hosts files as Open MPI and MPICH read theirs, what is refused in them, and what is said about hosts that do not fit."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from common import host_checks, host_probe, ssh_flags
from common.errors import UsageError
from common.host_checks import Place, check_hosts
from common.hosts import Host, merged, parse_host, read_hosts, shell_line
from common.ssh_flags import parse_ssh_flags, variables

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "text, host",
    [
        ("lab1", Host("lab1")),
        ("lab1 slots=2 max_slots=4", Host("lab1", slots=2)),
        ("lab1 max-slots = 4", Host("lab1", slots=4)),
        ("lab1 cpu=3", Host("lab1", slots=3)),
        ("lab1:2", Host("lab1", slots=2)),
        ("lab1:2 user=alice binding=rr", Host("lab1", "alice", slots=2)),
        ("alice@lab1.example.org port=2222", Host("lab1.example.org", "alice", 2222)),
        ("alice@example.org@lab1", Host("lab1", "alice@example.org")),
        ("192.0.2.7:3", Host("192.0.2.7", slots=3)),
        ("[fd00::1]:2", Host("fd00::1", slots=2)),
        ("bob@[fe80::1%eth0] slots=1", Host("fe80::1%eth0", "bob", slots=1)),
        ("node_1 SLOTS=2", Host("node_1", slots=2)),
    ],
)
def test_a_line(text, host):
    assert parse_host(text) == host


@pytest.mark.parametrize(
    "text, why",
    [
        ("-oProxyCommand=x", "'-oProxyCommand=x' is no host name"),
        ("lab1;rm", "'lab1;rm' is no host name"),
        ("$(id)", "is no host name"),
        ("lab1 slots=0", "slots=0 is not allowed: give a whole number, 1 or more"),
        ("lab1 slots=two", "slots=two is not allowed"),
        ("lab1 slots=", "slots= is not allowed"),
        ("lab1:", "slots are missing after the colon"),
        ("lab1:2 slots=3", "slots is given twice, 2 and 3"),
        ("lab1 slots=4 max_slots=2", "slots=4 is more than max_slots=2"),
        ("lab1 port=70000", "port=70000 is not allowed: give a whole number from 1 to 65535"),
        ("lab1 2", "'2' is not known here"),
        ("lab1 sloths=2", "'sloths=2' is not known here"),
        ("fd00::1", "an IPv6 address stands in brackets, [fd00::1]"),
        ("[lab1]", "[lab1] is no IPv6 address"),
        ("@lab1", "the user is missing"),
        ("-l@lab1", "'-l' is no user name"),
        ("+n0", "is no host name"),
        ("=2", "is no host name"),
    ],
)
def test_nonsense_is_refused_with_its_line(tmp_path, text, why):
    path = tmp_path / "hosts"
    path.write_text(f"# one\n\nlab0\n{text}  # two\n")
    with pytest.raises(UsageError) as refused:
        read_hosts(path)
    assert f"{path}, line 4: " in str(refused.value) and why in str(refused.value) and "\n" not in str(refused.value)


def test_a_file(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("\ufeff# lab\r\nlab1 slots=2 # first\r\n\r\n  lab2\r\nlab1\r\nlab2:3\r\nlab1 port=2222\r\n", encoding="utf-8")
    assert read_hosts(path) == [Host("lab1", slots=3, line=2), Host("lab2", slots=4, line=4), Host("lab1", port=2222, line=7)]
    assert [host.slots for host in read_hosts(ROOT / "hosts.example.txt")] == [2, 4, 2, None, None, 2]
    with pytest.raises(ValueError, match="lab1 is named twice, with user a and b"):
        merged([Host("lab1", "a"), Host("lab1", "b")])


@pytest.mark.parametrize(
    "content, why", [(None, "No such file"), ("# nobody\n\n", "names no host"), (b"\xff\xfe\x00", "no text file")]
)
def test_a_file_without_hosts(tmp_path, content, why):
    path = tmp_path / "hosts"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=why):
        read_hosts(path)


def test_everything_is_quoted(tmp_path):
    folder = tmp_path / "it's a $HOME; folder"
    folder.mkdir()
    words = [sys.executable, "-c", "import os, sys; print(os.getcwd(), os.environ['A'], sys.argv[1:])", "a b", "*", "$(id)", "'\""]
    line = shell_line(words, folder, {"A": "1 2;\n3"})
    ended = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60)
    assert ended.stdout == f"{folder} 1 2;\n3 {words[3:]}\n", ended
    ssh = Host("lab1", "alice", 2222).ssh(line, ["ssh", "-F", "a b"])
    assert ssh[:3] == ["ssh", "-F", "a b"] and ssh[-4:] == ["2222", "--", "alice@lab1", line] and "BatchMode=yes" in ssh


# ------------------------------------------------------------------------------------------------------ the flags


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts.txt").write_text("lab1:2\nlab2\n")
    return tmp_path


def test_which_hosts_and_ranks(folder):
    flags, rest = parse_ssh_flags(["--mode", "multi-node", "--gpus-per-node", "3", "--epochs", "2", "--lr=0.1", "--inspect"])
    assert [h.name for h in flags.hosts] == ["lab1", "lab2"] and flags.slots == [2, 3] and flags.port is None
    assert rest == ["--epochs", "2", "--lr=0.1", "--inspect"]
    words = [
        "--master-node",
        "a@lab3:4",
        "--worker-nodes",
        "lab4",
        "lab5,lab6",
        "--gpus_per_node=2",
        "--port",
        "1234",
        "--save",
        "x",
    ]
    flags, rest = parse_ssh_flags(words)
    assert [h.name for h in flags.hosts] == ["lab3", "lab4", "lab5", "lab6"] and flags.slots == [4, 2, 2, 2]
    assert flags.port == 1234 and flags.hosts[0].user == "a" and rest == ["--save", "x"]
    flags, rest = parse_ssh_flags(["--gpus", "2"])
    assert flags.single and flags.slots == [2]
    assert parse_ssh_flags([])[0].slots == [2, None]


@pytest.mark.parametrize(
    "words, why",
    [
        ("--mode both", "--mode both: not allowed; give single-node or multi-node"),
        ("--gpus 0", "--gpus 0: not allowed; give a whole number, 1 or more"),
        ("--gpus 2 --mode multi-node", "--gpus 2 with --mode multi-node"),
        ("--gpus 2 --hosts hosts.txt --mode single-node", "--hosts with --mode single-node"),
        ("--hosts hosts.txt --master_node lab1", "both name the hosts"),
        ("--worker_nodes lab1", "--worker_nodes without --master_node"),
        ("--master_node ;", "is no host name"),
        ("--hosts nothing.txt", "nothing.txt: cannot be read (No such file or directory)"),
        ("--port 0", "--port 0: not allowed; give a whole number from 1 to 65535"),
        ("--remote_dir here", "--remote_dir here: not allowed; give the whole path"),
        ("--ssh 'ssh", "No closing quotation"),
        ("--ssh_timeout never", "--ssh_timeout never: not allowed"),
        ("--here 2", "--here 2: not allowed; give a whole number from 0 to 1"),
    ],
)
def test_flags_that_are_refused(folder, words, why):
    with pytest.raises(UsageError) as refused:
        parse_ssh_flags(words.split(" ") if "'" in words else shlex.split(words))
    assert why in str(refused.value)


def test_without_a_file_all_ways_are_named(folder):
    (folder / "hosts.txt").unlink()
    with pytest.raises(
        UsageError, match=r"no hosts: write them into hosts\.txt .*--hosts.*--master_node.*--mode single-node --gpus N"
    ):
        parse_ssh_flags([])


def test_folders(folder, monkeypatch):
    monkeypatch.chdir(ROOT / "tests")
    place = parse_ssh_flags(["--master_node", "lab1", "--remote_dir", "/srv/lab", "--remote_python", "/usr/bin/python3"])[0].place
    assert (place.root, place.folder, place.python) == ("/srv/lab", "/srv/lab/tests", "/usr/bin/python3")
    monkeypatch.chdir(folder)
    place = parse_ssh_flags(["--master_node", "lab1"])[0].place
    assert (place.root, place.folder, place.python) == (str(ROOT), str(folder), sys.executable)


def test_who_is_this_host(folder):
    (folder / "hosts.txt").write_text("192.0.2.1\n127.0.0.1\n192.0.2.3\n")
    assert [parse_ssh_flags(["--here", who])[0].here for who in ("master", "worker", "2")] == [0, 1, 2]
    (folder / "hosts.txt").write_text("198.51.100.1\n198.51.100.2\n198.51.100.3\n")
    with pytest.raises(UsageError, match=r"none of the hosts is this machine; give its number \(0: 198\.51\.100\.1, 1: "):
        parse_ssh_flags(["--here", "worker"])


def test_what_travels(folder, monkeypatch):
    monkeypatch.setattr(ssh_flags.os, "environ", {"NCCL_DEBUG": "INFO", "HOME": "/root", "MY": "1", "RANK": "3"})
    flags = parse_ssh_flags(["--export", "MY"])[0]
    settled = {"EPOCHS": "2", "MASTER_ADDR": "127.0.0.1", "RANK": "3", "MY": "1", "SEED": ""}
    assert variables(flags, settled) == {"EPOCHS": "2", "MY": "1", "NCCL_DEBUG": "INFO"}
    with pytest.raises(UsageError, match="--export YOURS: no such variable here"):
        variables(parse_ssh_flags(["--export", "YOURS"])[0], settled)


# ------------------------------------------------------------------------------------------------------ the checks


NOT_SSH = """#!/bin/sh
for command; do name=$last; last=$command; done
case $name in
dead) sleep 60;;
chatty) echo "Welcome to the lab";;
old) exit 127;;
esac
exec sh -c "$command"
"""


@pytest.fixture
def not_ssh(tmp_path):
    """In ssh's place a program that runs the command here, for hosts with habits."""
    file = tmp_path / "not-ssh"
    file.write_text(NOT_SSH)
    file.chmod(0o755)
    return (str(file),)


def test_hosts_that_fit(not_ssh):
    place = Place(str(ROOT), str(ROOT), sys.executable, not_ssh)
    found = check_hosts([Host("localhost"), Host("chatty")], place, None, 60)
    assert found.problems == [] and found.notes == [] and found.master_addr == "localhost" and found.master_port > 0
    alone = check_hosts([Host("anybody")], place, None, 60)
    assert alone.problems == [] and alone.master_addr == "127.0.0.1"


def test_hosts_that_do_not(not_ssh, tmp_path):
    place = Place(str(tmp_path), "/no/folder", sys.executable, not_ssh)
    found = check_hosts([Host("localhost", line=1), Host("dead", line=2), Host("old", line=3)], place, None, 2)
    assert [row.partition(": ")[0] for row in found.problems] == ["localhost (line 1)", "dead (line 2)", "old (line 3)"], found
    assert "no LaunchLab in" in found.problems[0]
    assert found.problems[1].endswith("no answer within 2 s (--ssh_timeout)")
    assert f"no Python at {sys.executable} there" in found.problems[2]


def test_versions_and_clocks_that_differ(monkeypatch):
    """The comparison itself: a host whose Python, torch and folder differ, in one look."""
    checks = host_checks._Checks([Host("lab1"), Host("lab2")], Place(str(ROOT), "/srv", "python"), None, 1)
    same = {"python": "3.11.2", "torch": "2.13.0", "code": host_probe.code_of(str(ROOT)), "commit": "abc", "folder": True}
    checks.facts = {0: same, 1: same | {"python": "3.12.1", "torch": "2.12.0", "folder": False}}
    checks._compare()
    assert checks.trouble[0] == []
    assert checks.trouble[1] == [
        "no folder /srv there, where the ranks would start: make it, or go to the project's folder here",
        "Python 3.12.1, but 3.11.2 on lab1: install the same version on all hosts",
        "Torch 2.12.0, but 2.13.0 on lab1: install the same version on all hosts",
    ]

    class Late:
        def __init__(self, *_):
            pass

        def ask(self, *_, **__):
            return {}

        def ahead(self, **_):
            return -90.0, 0.01

    monkeypatch.setattr(host_checks, "ProbedHost", Late)
    checks._learn(1)
    assert checks.notes[1][0].startswith("its clock is 90.0 s behind this machine's"), checks.notes


def test_what_ssh_says_and_what_to_do():
    said = {
        "Host key verification failed.": "its host key is not known here: ssh -p 2222 a@lab1 once, look at it and say yes",
        "a@lab1: Permission denied (publickey).": "it lets in none of the keys offered: ssh-copy-id -p 2222 a@lab1",
        "@ REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.": "if you know why: ssh-keygen -R lab1",
        "kex_exchange_identification: read: x": "ssh cannot get in: kex_exchange_identification: read: x",
    }
    for text, remedy in said.items():
        place = Place("/", "/", "python", ("sh", "-c", f"printf %s {shlex.quote(text)} >&2; exit 255"))
        found = check_hosts([Host("lab1", "a", 2222)], place, None, 30)
        assert remedy in found.problems[0], found
