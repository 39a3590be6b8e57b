"""What the image's first process decides and does, and the limit of processor time, without a container."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import cgroup, container, device
from common.command_line import parse_config
from common.process_group import Group
from common.rank import Rank
from tests.common.helpers import ROOT, end_group, start

PLAIN = list(container.TRAIN)
ENTRY = [sys.executable, "-I", "-S", str(ROOT / "common" / "container.py")]
# As in a container: the entry is process 1 of a PID namespace of its own.
FIRST = ["unshare", *(["-Ur"] if os.getuid() else []), "--fork", "--pid", "--mount-proc", "--kill-child=KILL", *ENTRY]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], PLAIN),
        (["--epochs", "2"], [*PLAIN, "--epochs", "2"]),
        (["torchrun", "--nproc_per_node=2", "x.py"], ["torchrun", "--nproc_per_node=2", "x.py"]),
        (["bash"], ["bash"]),
    ],
)
def test_flags_go_to_plain_python_and_commands_are_left_alone(words, expected):
    assert container.command_of(words) == expected


def test_the_ranks_of_an_mpirun_are_counted_unless_they_are_on_other_hosts():
    assert container.mpi_ranks(["mpirun", "-np", "4", "python", "x.py"]) == 4
    assert container.mpi_ranks(["/usr/bin/mpiexec", "-n", "3", "x"]) == 3
    assert container.mpi_ranks(["mpirun", "-f", "hosts", "-np", "4", "x"]) == 0
    assert container.mpi_ranks(["mpirun", "x"]) == container.mpi_ranks(["python", "-np", "4"]) == 0


MIB = 1 << 20


@pytest.mark.parametrize(
    ("command", "size", "gpus", "said", "certain"),
    [
        (PLAIN, 1 * MIB, 0, "", False),  # gloo needs none
        (PLAIN, 64 * MIB, 1, "", False),  # a GPU alone has nobody to talk to
        (["mpirun", "-np", "4", "x"], 64 * MIB, 0, "", False),
        (["mpirun", "-np", "4", "x"], 2 * MIB, 0, "/dev/shm has 2 MiB: too small for 4 ranks under mpirun", True),
        (PLAIN, 64 * MIB, 2, "often too small for NCCL between 2 GPUs", False),
        (["python", "x.py", "--num_workers", "2"], 64 * MIB, 0, "often too small for DataLoader workers", False),
        (["python", "x.py", "--dataloader-num-workers=2"], 64 * MIB, 0, "often too small for DataLoader workers", False),
        (["python", "x.py", "--num_workers=0"], 64 * MIB, 0, "", False),
        (["python", "x.py", "--num_workers=2"], 1024 * MIB, 2, "", False),
    ],
)
def test_what_dev_shm_is_too_small_for(command, size, gpus, said, certain):
    reason, fails = container.too_small(command, size, gpus)
    assert said in reason and bool(said) == bool(reason) and fails == certain
    assert not reason or "--shm-size=1g" in reason


def test_a_loopback_master_is_noted_where_the_container_has_a_network_of_its_own():
    group = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": "0"}
    assert "MASTER_ADDR=127.0.0.1 is this container itself" in container.alone(group, ["lo", "eth0"])
    assert container.alone(group, ["lo", "enp3s0", "docker0"]) == ""  # --network host
    for other in ({"MASTER_ADDR": "rank0"}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "two"}, {"RANK": ""}):
        assert container.alone(group | other, ["lo", "eth0"]) == ""


def test_a_folder_that_cannot_be_written_is_named_with_its_owner(monkeypatch, tmp_path):
    environment = {"SAVE": str(tmp_path / "model.pt")}
    assert container.unwritable(PLAIN, environment) == ""
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    said = container.unwritable(PLAIN, environment)
    assert said.startswith(f"{tmp_path} belongs to user {tmp_path.stat().st_uid}:") and "--user $(id -u):$(id -g)" in said
    assert container.unwritable(["bash"], environment) == ""  # trains nothing
    assert container.unwritable([*PLAIN, "--save=x/y.pt"], environment) == ""  # is told to write elsewhere
    assert container.unwritable([*PLAIN, "--inspect"], environment) == container.unwritable(PLAIN, {}) == ""


@pytest.fixture
def first():
    """Starts the entry as process 1 of a PID namespace."""
    if subprocess.run(FIRST + ["true"], capture_output=True, timeout=30).returncode:
        pytest.skip("this machine gives no PID namespace")
    children = []

    def begin(*words):
        children.append(start([*FIRST, *words], cwd="/"))
        return children[-1]

    yield begin
    for child in children:
        end_group(child)


SAYS = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); print('up', flush=True); time.sleep(60)"


@pytest.mark.only_on("linux")
@pytest.mark.parametrize(
    ("words", "status"),
    [(["sh", "-c", "exit 3"], 3), (["sh", "-c", "kill -9 $$"], 137), (["true"], 0), (["no-such-command"], 127), (["/etc"], 126)],
)
def test_the_status_is_the_command_s(first, words, status):
    child = first(*words)
    _, err = child.communicate(timeout=30)
    assert child.returncode == status, err
    assert ("no such command in this image" in err) == (status == 127)


@pytest.mark.only_on("linux")
def test_process_1_passes_signals_on(first):
    child = first(sys.executable, "-c", SAYS)
    assert child.stdout.readline() == "up\n"
    entry = int(Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()[0])
    os.kill(entry, signal.SIGTERM)
    assert child.wait(10) == 5


@pytest.mark.only_on("linux")
def test_a_command_that_does_not_catch_a_signal_ends_by_it(first):
    child = first("sh", "-c", "echo up; sleep 60 & wait")
    assert child.stdout.readline() == "up\n"
    began = time.monotonic()
    os.kill(int(Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()[0]), signal.SIGTERM)
    assert child.wait(10) == 128 + signal.SIGTERM and time.monotonic() - began < container.LEAVE_S


@pytest.mark.only_on("linux")
def test_what_the_command_leaves_has_time_to_end_and_orphans_are_taken_in(first):
    child = first("sh", "-c", "setsid sh -c 'sleep 0.5; echo later' & exit 4")
    out, _ = child.communicate(timeout=30)
    assert (out, child.returncode) == ("later\n", 4)


@pytest.mark.only_on("linux")
def test_ctrl_c_in_a_terminal_reaches_the_command_once(first):
    """``docker run -it``: the command is the terminal's foreground group; process 1 is not, and passes nothing on twice."""
    first("true").wait(30)  # skips where there are no namespaces
    keyboard, terminal = pty.openpty()
    count = "import signal, time; signal.signal(signal.SIGINT, lambda *_: print('caught', flush=True)); print('up', flush=True)"
    words = ["setsid", "--ctty", "--wait", *FIRST, sys.executable, "-c", f"{count}; time.sleep(1); time.sleep(1)"]
    child = start(words, cwd="/", stdin=terminal)
    try:
        assert child.stdout.readline() == "up\n"
        os.write(keyboard, b"\x03")
        assert child.communicate(timeout=30)[0].split() == ["caught"] and child.returncode == 0
    finally:
        end_group(child)
        os.close(keyboard)
        os.close(terminal)


@pytest.mark.only_on("linux")
def test_with_an_init_of_docker_s_own_it_becomes_the_command():
    child = start([*ENTRY, "sh", "-c", "echo $$"], cwd="/")
    try:
        assert child.communicate(timeout=30)[0] == f"{child.pid}\n"
    finally:
        end_group(child)


@pytest.mark.only_on("linux")
def test_other_ranks_than_0_are_not_asked_to_save():
    for rank, seen in (("0", "/x/model.pt"), ("1", "")):
        env = os.environ | {"RANK": rank, "SAVE": "/x/model.pt"}
        done = subprocess.run([*ENTRY, "sh", "-c", "echo $SAVE"], env=env, capture_output=True, text=True, timeout=30)
        assert done.stdout == f"{seen}\n", done.stderr


def cgroups(tmp_path, membership, **files):
    (tmp_path / "membership").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "mount" / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cfs_", "cpu.cfs_")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return cgroup.cpu_quota(tmp_path / "mount", tmp_path / "membership")


def test_version_2_the_smallest_limit_of_the_cgroup_and_those_above_counts(tmp_path):
    assert cgroups(tmp_path, "0::/a/b\n", a__cpu_max="150000 100000\n", a__b__cpu_max="max 100000\n") == 1.5
    assert cgroups(tmp_path, "0::/a/b\n", a__b__cpu_max="50000 100000\n") == 0.5


def test_version_1_and_a_container_that_sees_its_own_cgroup_as_the_root(tmp_path):
    membership = "4:memory:/docker/x\n2:cpu,cpuacct:/docker/x\n0::/\n"
    assert cgroups(tmp_path, membership, **{"cpu,cpuacct__cfs_quota_us": "200000", "cpu,cpuacct__cfs_period_us": "100000"}) == 2.0


def test_no_limit_is_none(tmp_path):
    assert cgroups(tmp_path, "2:cpu:/\n0::/\n", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000", cpu_max="max 100000") is None
    assert cgroups(tmp_path, "0::/nowhere\n") is None
    assert cgroups(tmp_path, "0::/\n", cpu_max="nonsense") is None
    assert cgroup.cpu_quota(tmp_path, tmp_path / "absent") is None


@pytest.mark.parametrize(("quota", "threads"), [(None, 4), (2.0, 2), (2.9, 2), (0.5, 1), (100.0, 4)])
def test_a_quota_is_the_most_threads_that_a_rank_gets(quota, threads):
    cores = [list(range(8))] * 2
    assert device.share_of_cores(cores[0], cores, quota) == threads


@pytest.mark.parametrize(
    ("nodes", "clocks", "quotas", "threads"),
    [
        ([0, 1], "ab", [None, None], [8, 8]),  # two machines
        ([0, 1], "aa", [None, None], [4, 4]),  # two containers on one
        ([0, 1], "aa", [2.0, None], [2, 4]),  # one of them with --cpus=2
        ([0, 0], "aa", [6.0, 6.0], [3, 3]),  # two ranks in one container with --cpus=6
        ([0, 0, 1], "aab", [1.0, 1.0, None], [1, 1, 8]),
    ],
)
def test_containers_on_one_machine_share_its_cores_and_each_has_its_own_quota(nodes, clocks, quotas, threads):
    config = parse_config("plain.py", argv=[], environment={})
    arrivals = [
        {"node_rank": n, "cores": list(range(8)), "clock": c, "quota": q} for n, c, q in zip(nodes, clocks, quotas, strict=True)
    ]
    for number, node in enumerate(nodes):
        local = nodes.count(node)
        rank = Rank("plain", number, len(nodes), number % local, local, node, "rank0", 1)
        assert Group(rank, device.torch.device("cpu"), "gloo", arrivals).threads(config, 1) == threads[number]
