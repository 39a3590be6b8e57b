"""The doctor and setup.sh over several hosts: a virtual cluster with a real sshd each, in which things are really broken."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from running import ROOT, cluster

pytestmark = [pytest.mark.launch, pytest.mark.only_on("linux")]


@pytest.fixture(scope="module")
def three():
    with cluster(3, ssh=True) as hosts:
        yield hosts


def sh(three, name, text):
    """Runs a shell script on a host; it must succeed."""
    ended = three.run(["sh", "-ec", f"PATH=$PATH:/usr/sbin:/sbin\n{text}"], on=name)[name]
    assert ended.returncode == 0, ended
    return ended.stdout


@contextmanager
def broken(three, name, how, mended):
    """A host that is broken within."""
    sh(three, name, how)
    try:
        yield
    finally:
        sh(three, name, mended)


def on_node1(three, words, folder, limit=200, **env):
    """Runs a command on node1 as it is: no {name} of it is filled in."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with three.popen("node1", words, env, folder, **pipes) as process:
        try:
            out, err = process.communicate(timeout=limit)
        finally:
            process.kill()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def doctor(three, folder, hosts, *flags, status=None, text=False):
    """(the rows, by check and host; all of them) of a doctor that runs on node1."""
    (folder / "hosts.txt").write_text(hosts)
    words = [sys.executable, "-m", "common.doctor", "--hosts", str(folder / "hosts.txt"), "--only", "variables", *flags]
    ended = on_node1(three, [*words, *([] if text else ["--json"])], ROOT)
    assert ended.stderr == "", ended
    assert status is None or ended.returncode == status, ended
    if text:
        return ended.stdout
    rows = json.loads(ended.stdout)["rows"]
    assert not [row for row in rows if "the check itself failed" in row["found"]], rows
    return rows


def findings(rows):
    return [(row["host"], row["check"], row["found"], row["mend"]) for row in rows if row["state"] == "finding"]


def only(rows, host, check):
    """The one finding of a check on a host."""
    found = [row for row in rows if (row["host"], row["check"], row["state"]) == (host, check, "finding")]
    assert len(found) == 1, rows
    return found[0]


DROP = """
iptables -A INPUT -i lo -j ACCEPT
iptables -A INPUT -m state --state ESTABLISHED,RELATED -j ACCEPT
iptables -A INPUT -p tcp --dport 22 -j ACCEPT
{}
iptables -P INPUT DROP
"""
OPEN = "iptables -P INPUT ACCEPT; iptables -F INPUT"


def test_hosts_where_all_is_well(three, tmp_path):
    rows = doctor(three, tmp_path, "node1\nnode2\nnode3  # slots\n", status=0)
    assert findings(rows) == []
    told = {(row["host"], row["check"]): row["found"] for row in rows if row["state"] == "ok"}
    assert told["", "ssh to hosts"] == "3 hosts let this machine in without a password"
    assert "on all 3 hosts" in told["", "equal versions"] and "torch" in told["", "equal versions"]
    assert "each of 3 hosts reaches each other on port 29500" in told["", "reachability"]
    assert (
        "1 MB in" in told["", "all-reduce over hosts"]
        and "a rank on each of 3 hosts, gloo, eth0" in told["", "all-reduce over hosts"]
    )
    assert {("node1", "doctor"), ("node2", "doctor"), ("node3", "doctor")} <= set(told)
    clocks = next(row["facts"] for row in rows if row["check"] == "clock")
    assert set(clocks) == {"node1", "node2", "node3"} and max(map(abs, clocks.values())) < 0.5


def test_a_firewall_on_one_host(three, tmp_path):
    """ssh works, no other port does: what a learner sees as a run that never starts."""
    with broken(three, "node2", DROP.format(""), OPEN):
        rows = doctor(three, tmp_path, "node1\nnode2\n", status=1)
        row = only(rows, "node2", "reachability")
        assert row["found"] == (
            "node1 does not reach node2 on 29500 and high ports (no answer within 3 s), where ssh "
            "gets through: a firewall is in between"
        )
        assert row["mend"] == "ssh node2 sudo iptables -I INPUT -s 10.97.0.1 -p tcp -j ACCEPT"
        wall = only(rows, "node2", "firewall")
        assert wall["found"] == "iptables: -P INPUT DROP: gloo and NCCL need more ports than 29500, any of them"
        assert wall["mend"] == "sudo iptables -I INPUT -s 10.97.0.0/24 -p tcp -j ACCEPT"
        unchecked = {row["check"]: row["found"] for row in rows if row["state"] == "not checked"}
        assert unchecked["all-reduce over hosts"] == "the hosts do not all reach each other yet"
        # The very line mends it (there is no sudo on a virtual host, and no need of one).
        sh(three, "node1", row["mend"].replace("sudo ", "PATH=$PATH:/usr/sbin "))
        rows = doctor(three, tmp_path, "node1\nnode2\n", status=1)
        assert [(host, check) for host, check, *_ in findings(rows)] == [("node2", "firewall")]


def test_one_direction_one_port_and_a_name(three, tmp_path):
    reject = "iptables -A INPUT -p tcp --dport 29500 -j REJECT"
    forget = "cp /etc/hosts /dev/shm/hosts; grep -v 'node1$' /dev/shm/hosts > /etc/hosts"
    only_one = DROP.format("iptables -A INPUT -p tcp --dport 29500 -j ACCEPT")
    with (
        broken(three, "node1", reject, OPEN),
        broken(three, "node2", only_one, OPEN),
        broken(three, "node3", forget, "cat /dev/shm/hosts > /etc/hosts"),
    ):
        rows = doctor(three, tmp_path, "node1\nnode2\nnode3\n", status=1)
    reached = {found: (host, mend) for host, check, found, mend in findings(rows) if check == "reachability"}
    let = "ssh {} sudo iptables -I INPUT -s {} -p tcp -j ACCEPT"
    expected = {
        "node2 does not reach node1 on 29500 (Connection refused)": ("node1", let.format("node1", "10.97.0.2")),
        "node1 reaches node2 on 29500, but on no high port": ("node2", let.format("node2", "10.97.0.1")),
        "node3 reaches node2 on 29500, but on no high port": ("node2", let.format("node2", "10.97.0.3")),
        "on node3 the name node1 does not resolve": ("node3", 'echo "10.97.0.1 node1" | ssh node3 sudo tee -a /etc/hosts'),
    }
    assert len(reached) == len(expected), reached
    for begins, where in expected.items():
        assert [w for found, w in reached.items() if found.startswith(begins)] == [where], reached
    assert sum("gloo and NCCL need more ports than 29500" in found for found in reached) == 2


def test_a_name_that_is_loopback_and_a_slow_link(three, tmp_path):
    loop = "cp /etc/hosts /dev/shm/hosts; sed 's/^10.97.0.2 node2$/127.0.1.1 node2/' /dev/shm/hosts > /etc/hosts"
    with broken(three, "node2", loop, "cat /dev/shm/hosts > /etc/hosts"):
        three.set_rate("100mbit")
        try:
            rows = doctor(three, tmp_path, "node1\nnode2\n", status=1)
        finally:
            three.set_rate(None)
    name = only(rows, "node2", "host name")
    assert name["found"].startswith("node2 resolves to 127.0.1.1, the loopback interface: bare torchrun with gloo hangs")
    assert name["mend"] == "export GLOO_SOCKET_IFNAME=eth0"
    # LaunchLab takes the interface of the route, so its ranks meet all the same: at the link's speed.
    slow = only(rows, "", "all-reduce over hosts")
    assert 0.05 < slow["facts"]["seconds"] < 2 and slow["facts"]["interface"] == "eth0"
    assert "DDP would wait for its gradients, and may be slower than one process" in slow["found"]


def test_a_taken_port(three, tmp_path):
    listen = "import socket, time; s = socket.create_server(('', 29500)); print('up', flush=True); time.sleep(100)"
    taken = three.popen("node2", [sys.executable, "-c", listen], stdout=subprocess.PIPE, text=True)
    try:
        assert taken.stdout.readline() == "up\n"
        text = doctor(three, tmp_path, "node1\nnode2\n", text=True)
    finally:
        taken.kill()
        taken.communicate(timeout=10)
    flat = " ".join(text.split())
    assert "node2: port 29500 is taken by" in flat and "export MASTER_PORT=" in flat
    assert "node2: reachability 29500 cannot be listened on (Address already in use)" in flat
    assert all(len(line) <= 100 for line in text.splitlines() if "export" not in line and "iptables" not in line)


def test_hosts_that_ssh_does_not_lead_to(three, tmp_path):
    three.cut("node3")
    try:
        rows = doctor(three, tmp_path, "node1\nnode2 port=2222\nnode3\nnode9\n", status=1)
    finally:
        three.heal("node3")
    told = {host: (found, mend) for host, check, found, mend in findings(rows) if check == "ssh to hosts"}
    assert set(told) == {"node2", "node3", "node9"}
    assert "no sshd answers there" in told["node2"][0] and "Connection refused" in told["node2"][0]
    assert "it does not answer" in told["node3"][0] or "no route leads there" in told["node3"][0]
    assert "nobody knows this name" in told["node9"][0] and told["node9"][1] == 'echo "ADDRESS node9" | sudo tee -a /etc/hosts'


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_another_python_and_another_clock(three, tmp_path):
    """Each host has its own interpreter: node1's is this one, node2's has no torch, node3's lives a minute and a half ahead."""
    if not shutil.which("faketime"):
        pytest.skip("no faketime here: apt install faketime")
    bare = shutil.which("python3", path="/usr/bin:/bin")
    assert bare, "a Python without torch: apt install python3"
    program(tmp_path / "node1/python", f'exec {sys.executable} "$@"')
    program(tmp_path / "node2/python", f'exec {bare} -s "$@"')
    program(tmp_path / "node3/python", f'DONT_FAKE_MONOTONIC=1 exec faketime -f +90s {sys.executable} "$@"')
    rows = doctor(three, tmp_path, "node1\nnode2\nnode3\n", "--remote_python", str(tmp_path / "{name}" / "python"), status=1)
    assert "torch cannot be imported (ModuleNotFoundError: No module named 'torch')" in only(rows, "node2", "versions")["found"]
    differ = {found.partition(" ")[0]: (found, mend) for _, check, found, mend in findings(rows) if check == "equal versions"}
    assert "node2 none" in differ["torch"][0] and differ["torch"][1] == f"./setup.sh --multi-node --hosts {tmp_path}/hosts.txt"
    clock = only(rows, "", "clock")
    assert 89 < clock["facts"]["node3"] < 91 and abs(clock["facts"]["node1"]) < 1
    assert clock["mend"] == "ssh node3 sudo timedatectl set-ntp true"


# --------------------------------------------------------------------------------------------------------- setup.sh

PYTHON_OF_THIS_KIND = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout of this code whose requirements are one small wheel: it lets its environment find the packages of this one.

    So make, venv, pip and git are the real ones, and torch is not copied about.
    """
    base = tmp_path_factory.mktemp("setup")
    (base / "wheels").mkdir()
    with zipfile.ZipFile(base / "wheels" / "the_rest-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("the_rest.pth", sysconfig.get_path("purelib") + "\n")
        wheel.writestr("the_rest-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: the-rest\nVersion: 1.0\n")
        wheel.writestr("the_rest-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("the_rest-1.0.dist-info/RECORD", "")
    here = base / "here"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n")
    for name in filter(lambda n: n and "/results/" not in n and not n.startswith("notebooks/"), files):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, here / name)
    (here / "requirements.txt").write_text("the-rest==1.0\n")
    git(here, "init", "-q", "-b", "main")
    git(here, "add", "-A")
    git(here, "commit", "-qm", "LaunchLab")
    return here


def git(folder, *words):
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def setup(three, here, *flags):
    env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(here.parent / "wheels"), "PYTHON": sys.executable}
    ended = on_node1(three, ["./setup.sh", *flags], here, limit=300, **env)
    assert "Traceback" not in ended.stdout + ended.stderr, ended
    return ended


def test_setup_of_several_hosts(three, checkout):
    folder, wanted = checkout.parent, git(checkout, "rev-parse", "HEAD")
    (folder / "hosts.txt").write_text("node2\nnode3\n")
    flags = ("--multi-node", "--hosts", str(folder / "hosts.txt"), "--dir", str(folder / "at {name}"))
    done = setup(three, checkout, *flags)
    assert done.returncode == 0, done
    for name in ("node2", "node3"):
        there = folder / f"at {name}"
        assert f"[{name}] to be copied: {there} is not there\n" in done.stdout
        assert f"[{name}] commit {wanted[:10]} copied\n" in done.stdout
        assert f"[{name}] Successfully installed the-rest-1.0" in done.stdout
        assert git(there, "rev-parse", "HEAD") == wanted and git(there, "status", "--porcelain") == ""
        assert (there / ".venv/.ready").exists() and not (there / ".launchlab.bundle").exists()
    flat = " ".join(done.stdout.split())
    assert f"commit {wanted[:10]}, on all 2 hosts" in flat and "each of 2 hosts reaches each other" in flat
    assert "all-reduce over hosts 1 MB in" in flat

    # Again: nothing to do. A new commit: it is copied, the environment stays. A file changed there: nothing is overwritten.
    (checkout / "README.md").write_text("changed\n")
    again = setup(three, checkout, *flags)
    assert again.returncode == 0 and f"[node2] {folder}/at node2 has commit {wanted[:10]}" in again.stdout, again
    assert "copied" not in again.stdout and "[node3] make: '.venv/.ready' is up to date." in again.stdout
    assert f"Note: changes that are not committed stay here; the hosts get commit {wanted[:10]}" in again.stdout
    git(checkout, "commit", "-qam", "Changed")
    (folder / "at node3" / "LICENSE").write_text("mine\n")
    refused = setup(three, checkout, *flags)
    assert refused.returncode == 1 and f"[node3] {folder}/at node3 has changes that are not committed (M LICENSE)" in refused.stdout
    assert "setup: nothing was changed on any host; mend node3 first (above), then type it again" in refused.stderr
    assert git(folder / "at node2", "rev-parse", "HEAD") == wanted


def test_setup_that_cannot_be(three, checkout, tmp_path):
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("node2\nnode9\n")
    flags = ("--multi-node", "--hosts", str(hosts), "--dir", "/tmp")
    ended = setup(three, checkout, *flags)
    assert ended.returncode == 1 and "mend node2, node9 first" in ended.stderr, ended
    assert "[node2] /tmp is there and is no copy of LaunchLab; name another folder with --remote_dir" in ended.stdout
    assert "[node9] ssh does not lead there" in ended.stdout
    hosts.write_text("node2 slots=two\n")
    refused = setup(three, checkout, *flags)
    assert refused.returncode == 2 and "line 1" in refused.stderr
    unknown = setup(three, checkout, "--hosts", str(hosts))
    assert unknown.returncode == 2 and unknown.stderr.startswith("error: --hosts: no such flag without --multi-node")


def test_setup_over_a_shared_folder_and_a_slow_build(three, checkout, tmp_path):
    (tmp_path / "hosts.txt").write_text("node2\n")
    flags = ("--multi-node", "--hosts", str(tmp_path / "hosts.txt"))
    shared = setup(three, checkout, *flags)
    assert f"[node2] {checkout} is this very folder" in shared.stdout and shared.returncode == 0, shared
    late = setup(three, checkout, *flags, "--dir", str(tmp_path / "late"), "--limit", "0.05")
    assert late.returncode == 1 and "the environment was not made on node2 (not within 0.05 s, --limit)" in late.stderr, late


def test_the_script_is_clean():
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck here: apt install shellcheck")
    done = subprocess.run(["shellcheck", str(ROOT / "setup.sh")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert os.access(ROOT / "setup.sh", os.X_OK) and not Path(ROOT / ".setup").exists()
