"""The virtual cluster: hosts that are hosts to each other, and that are gone however it ends."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, Run, cluster, run

from common.virtual_cluster import VirtualCluster
from common.virtual_host import FOLDER
from tests.common.helpers import until

pytestmark = [pytest.mark.launch, pytest.mark.only_on("linux")]
CLI = ["python", "-m", "common.virtual_cluster"]

# A program that sends what it reads for a second, and one that counts it: bits per second.
RECEIVE = """
import socket, sys, time
with socket.create_server(("", 7000)) as listener:
    peer = listener.accept()[0]
    count, began = 0, time.monotonic()
    while data := peer.recv(1 << 16):
        count += len(data)
print(8 * count / (time.monotonic() - began))
"""
SEND = """
import socket, sys, time
until = time.monotonic() + 10
while True:
    try:
        peer = socket.create_connection((sys.argv[1], 7000), 5)
        break
    except OSError:
        assert time.monotonic() < until
        time.sleep(0.05)
end = time.monotonic() + 1.5
while time.monotonic() < end:
    peer.sendall(bytes(1 << 16))
peer.close()
"""


@pytest.fixture(scope="module")
def three():
    with cluster(3, ssh=True) as hosts:
        yield hosts


def said(cluster, name, *words, **options):
    ended = cluster.run(list(words), on=name, **options)[name]
    assert ended.returncode == 0, ended
    return ended.stdout.strip()


def test_each_host_has_a_name_an_address_and_processes_of_its_own(three):
    for name, address in three.addresses.items():
        assert said(three, name, "hostname") == name
        assert address in said(three, name, "ip", "-brief", "-4", "address", "show", "eth0")
        assert said(three, name, "sh", "-c", "getent hosts {master}; getent ahosts {name}").split()[0] == three.addresses["node1"]
        assert said(three, name, "python3", "-c", "import os; print(os.sched_getaffinity(0))") == str(three.cores[name])
    (three.folder / "only-here").touch()
    assert said(three, "node2", "ls", FOLDER + "/only-here"), "one file system"
    said(three, "node1", "sh", "-c", "echo x > /dev/shm/mine")
    assert said(three, "node2", "ls", "/dev/shm") == ""
    sleeper = three.popen("node1", ["sleep", "100"])
    try:
        # popen returns when the way into the host starts, not the command.
        assert until(lambda: sleeping("node1", three)) and not sleeping("node2", three)
    finally:
        sleeper.terminate()
        assert sleeper.wait(10) == -signal.SIGTERM


def sleeping(name, cluster):
    rows = said(cluster, name, "sh", "-c", "for f in /proc/[0-9]*/cmdline; do tr '\\0' ' ' < $f; echo; done 2>/dev/null || true")
    return [row for row in rows.splitlines() if row.startswith("sleep")]


def test_hosts_reach_each_other_by_name_and_a_cut_one_is_not_reached(three):
    ping = ["ping", "-c", "1", "-W", "1"]
    assert said(three, "node1", *ping, "node3") and said(three, "node3", *ping, "-6", "node1-ip6")
    three.cut("node3")
    try:
        assert three.run([*ping, "node3"], on="node1")["node1"].returncode == 1
        assert three.run([*ping, "node1"], on="node3")["node3"].returncode != 0
        assert said(three, "node1", *ping, "node2")
    finally:
        three.heal("node3")
    assert said(three, "node1", "ping", "-c", "1", "-W", "5", "node3")


def test_ssh_works_from_every_host_to_every_other(three):
    for name in three.names:
        others = "; ".join(f"ssh {other} hostname" for other in three.names)
        assert said(three, name, "sh", "-c", others).split() == three.names
    outsider = [
        "ssh",
        "-o",
        "IdentityFile=none",
        "-F",
        "none",
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "BatchMode=yes",
        "node2",
        "id",
    ]
    refused = three.run(outsider, on="node1")["node1"]
    assert refused.returncode == 255 and "Permission denied" in refused.stderr, refused


def test_statuses_and_signals_of_commands_are_handed_on(three):
    assert three.run(["sh", "-c", "exit $(({rank} + 3))"])["node2"].returncode == 4
    assert three.run(["sh", "-c", "kill -TERM $$"], on="node1")["node1"].returncode == -signal.SIGTERM
    assert three.run(["sh", "-c", "kill -KILL $$"], on="node1")["node1"].returncode == -signal.SIGKILL
    assert three.run(["no-such-program"], on="node1")["node1"].returncode == 127
    with pytest.raises(subprocess.TimeoutExpired):
        three.run(["sleep", "100"], timeout=1)
    process = three.popen(
        "node1", ["sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done"], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    assert process.wait(10) == 9
    process.stdout.close()
    process = three.popen("node1", ["sleep", "100"])
    assert until(lambda: sleeping("node1", three))
    process.kill()
    process.wait(10)
    assert until(lambda: not sleeping("node1", three)) and not sleeping("node2", three)


def bits_per_second(cluster):
    receiver = cluster.popen("node1", [sys.executable, "-c", RECEIVE], stdout=subprocess.PIPE)
    try:
        assert cluster.run([sys.executable, "-c", SEND, "node1"], on="node2", timeout=30)["node2"].returncode == 0
        return float(receiver.communicate(timeout=10)[0])
    finally:
        receiver.kill()
        receiver.communicate()


def test_the_rate_is_the_links_rate():
    with cluster(2, rate="20mbit") as hosts:
        slow = bits_per_second(hosts)
        hosts.set_rate("100mbit")
        faster = bits_per_second(hosts)
        hosts.set_rate(None)
        free = bits_per_second(hosts)
    assert 12e6 < slow < 22e6 and 60e6 < faster < 110e6 and free > 300e6, (slow, faster, free)


def round_trip_ms(text):
    return float(re.search(r"= ([\d.]+)/", text)[1])


@pytest.mark.parametrize("rate", [None, "100mbit"])
def test_the_delay_is_there_each_way(rate):
    with cluster(2, delay="10ms", rate=rate) as hosts:
        least = round_trip_ms(said(hosts, "node1", "ping", "-c", "5", "-i", "0.2", "node2"))
        assert said(hosts, "node2", "ping", "-c", "1", "-W", "5", "node1")
        through = bits_per_second(hosts)
        hosts.cut("node2")
        assert hosts.run(["ping", "-c", "1", "-W", "1", "node2"], on="node1")["node1"].returncode == 1
        hosts.heal("node2")
        assert said(hosts, "node1", "ping", "-c", "1", "-W", "5", "node2")
    assert 20 <= least < 40, least
    assert (through < 110e6) == bool(rate) and through > 30e6, through


def test_a_killed_host_is_gone_and_the_others_stay(three):
    with cluster(2) as hosts:
        sleeper = hosts.popen("node2", ["sh", "-c", "echo ready; exec sleep 100"], stdout=subprocess.PIPE)
        assert sleeper.stdout.readline() == b"ready\n"
        hosts.kill("node2")
        assert sleeper.wait(10) == -signal.SIGKILL
        sleeper.stdout.close()
        gone = hosts.run(["hostname"], on="node2")["node2"]
        assert gone.returncode == 1 and gone.stderr == "this host has been killed\n"
        assert said(hosts, "node1", "hostname") == "node1"


# ------------------------------------------------------------------------------------------------- the command


def test_the_command_prefixes_by_host_and_ends_with_the_worst_status():
    ended = run([*CLI, "--names", "lab1,lab2", "--", "sh", "-c", "echo {rank} $(hostname) {addr}; exit {rank}"])
    assert ended.status == 1, str(ended)
    assert sorted(ended.out.splitlines()) == ["[lab1] 0 lab1 10.97.0.1", "[lab2] 1 lab2 10.97.0.2"]


def test_it_trains():
    script = ["python", "launchers/plain.py", "--nnodes", "2", "--node_rank", "{rank}", "--master_addr", "{master}"]
    ended = run([*CLI, "--nodes", "2", "--", *script, "--job", "random", "--epochs", "1", "--data_size", "128"])
    assert ended.status == 0, str(ended)
    assert (
        "[node1] Launcher plain: 2 ranks on 2 nodes" in ended.out and "[node2] [Rank 1] Process initialized on node2" in ended.out
    )


def test_without_a_command_it_is_a_shell_on_the_first_host():
    shell = subprocess.run(
        [sys.executable, "-m", "common.virtual_cluster", "--nodes", "2"],
        input="hostname; ssh node2 hostname; exit 7\n",
        env=os.environ | {"SHELL": "/bin/sh"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (shell.returncode, shell.stdout) == (7, "node1\nnode2\n"), shell
    assert "This shell is on node1; ssh node2 reaches another; exit ends the cluster." in shell.stderr


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_however_it_ends_nothing_is_left(how, tmp_path):
    started = Run([*CLI, "--nodes", "2", "--ssh", "--", "sh", "-c", f"setsid sleep 100 & touch {tmp_path}/{{name}}; sleep 100"])
    started.until(lambda: len(list(tmp_path.iterdir())) == 2, "both commands")
    number = getattr(signal, how)
    if how == "SIGKILL":
        started.process.kill()
    else:
        os.killpg(started.process.pid, number)
    ended = started.finish(30)  # which looks for processes left
    assert ended.status == {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGKILL": -9}[how], str(ended)
    assert "Traceback" not in ended.err
    assert not [mount for mount in Path("/proc/self/mounts").read_text().splitlines() if "launchlab" in mount]


# ----------------------------------------------------------------------------------- without root, without anything

LEARNER = 12345


def as_learner(tmp_path, script):
    """The words that run ``script`` as an ordinary user with an entry in /etc/passwd, which exists only for that command."""
    if os.geteuid() != 0:
        pytest.skip("only root can become an ordinary user")
    passwd = tmp_path / "passwd"
    passwd.write_text(Path("/etc/passwd").read_text() + f"learner:x:{LEARNER}:{LEARNER}::{tmp_path}/home:/bin/sh\n")
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, LEARNER, LEARNER)
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        folder.chmod(folder.stat().st_mode | 0o011)
    (tmp_path / "script.py").write_text(script)
    code = tmp_path / "code"  # the repository may be where others cannot enter
    shutil.copytree(ROOT / "common", code / "common", ignore=shutil.ignore_patterns("__pycache__", "data"))
    program = f"/usr/bin/python{sys.version_info[0]}"  # this one may be in a home that others cannot enter
    if not shutil.which(program):
        pytest.skip(f"{program} is not here: an ordinary user needs a Python that it can run")
    drop = f"exec setpriv --reuid={LEARNER} --regid={LEARNER} --clear-groups env HOME={home} PYTHONPATH={code}"
    begin = f"mount --bind {passwd} /etc/passwd && cd {home} &&"
    return ["unshare", "--mount", "sh", "-c", f"{begin} {drop} {program} -B {tmp_path}/script.py"]


ROOTLESS = """
import os, subprocess, sys
from common.virtual_cluster import VirtualCluster

with VirtualCluster(2, rate="50mbit", delay="5ms", ssh=True) as cluster:
    ended = cluster.run(["sh", "-c", "id -u; hostname; ssh {master} hostname; ping -c 3 -i 0.2 {master}"])
    print({name: each.stdout for name, each in ended.items()}, *(each.stderr for each in ended.values()))
    cluster.cut("node2")
    assert cluster.run(["ping", "-c", "1", "-W", "1", "node2"], on="node1")["node1"].returncode
    cluster.heal("node2")
    assert not cluster.run(["ping", "-c", "1", "-W", "5", "node2"], on="node1")["node1"].returncode
"""


def test_an_ordinary_user_can_have_one(tmp_path):
    ended = run(as_learner(tmp_path, ROOTLESS))
    assert ended.status == 0 and ended.err == "", str(ended)
    found = eval(ended.out)
    assert found["node1"].startswith(f"{LEARNER}\nnode1\nnode1\n") and found["node2"].startswith(f"{LEARNER}\nnode2\nnode1\n")
    assert round_trip_ms(found["node2"]) >= 10


@pytest.mark.parametrize(
    ("forbid", "then", "who", "remedy"),
    [
        ("max_net_namespaces", "", "root", "start this container with --privileged"),
        ("max_user_namespaces", "unshare --user --map-user=12345 --map-group=12345", "an ordinary user", "use sudo, or allow user"),
    ],
)
def test_where_it_cannot_be_one_line_says_what_is_missing_and_what_still_works(forbid, then, who, remedy):
    """In a user namespace root is no more than what that is allowed: it may have so many namespaces (namespaces(7))."""
    allowed = 1 if then else 0  # one for the ordinary user to be in
    script = f"echo {allowed} > /proc/sys/user/{forbid} && exec {then} {sys.executable} -m common.virtual_cluster -- true"
    ended = run(["unshare", "--user", "--map-root-user", "sh", "-c", script])
    assert ended.status == 2 and ended.err.count("\n") == 1, str(ended)
    assert f"a virtual cluster needs namespaces, which {who} cannot make here (unshare: unshare failed: " in ended.err
    assert remedy in ended.err and "everything on one node works without" in ended.err


def test_a_program_that_lacks_is_named_with_its_package(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.namespaces.environment", lambda more=None: {"PATH": str(tmp_path)})
        ended = VirtualCluster(2)
        with pytest.raises(Exception, match=r"a virtual cluster needs iproute2, util-linux: apt install iproute2 util-linux"):
            ended.__enter__()
