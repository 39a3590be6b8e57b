"""The doctor on one machine: each check where something is really broken, or with the facts of a machine that is."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import doctor, doctor_machine, doctor_mpi, doctor_network, doctor_ranks, doctor_tools, torch_facts
from common.doctor_rows import FINDING, OK, UNCHECKED, Row, Subject, ask, finding, ok, unchecked
from common.errors import UsageError
from common.ports import PortReservation
from common.virtual_cluster import missing

# Variables that would be leftovers to the doctor, were the tests themselves started with them.
HELD = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
GOOD = {"python": "3.11.2", "torch": "2.13.0", "numpy": "2.4.6", "mpi4py": "4.1.2", "backends": ["gloo"], "cuda": None, "gpus": []}


def subject(ranks=2, several=False, purpose=None, torch=(), **environment):
    return Subject({"PATH": os.environ["PATH"], **environment}, purpose, ranks, several, GOOD | dict(torch))


def states(row, state, *words):
    assert row.state == state, row
    for word in words:
        assert word in f"{row.found} | {row.mend}", row
    assert (row.state == FINDING) == bool(row.mend)
    assert row.found and "\n" not in row.found + row.mend
    return row


# ------------------------------------------------------------------------------------------------ packages and GPUs


def test_versions_of_this_python():
    row = states(doctor_machine.packages(subject(torch=torch_facts.facts())), OK, "torch", "numpy")
    assert row.facts["python"] == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize(
    ("torch", "words"),
    [
        ({"python": "3.9.2"}, ["LaunchLab needs 3.10 or newer", "PYTHON=python3.12"]),
        ({"torch": "2.8.0"}, ["torch 2.8.0; LaunchLab runs on 2.9 or newer", "pip install -r requirements.txt"]),
        ({"torch": "3.1.0"}, ["below 3"]),
        ({"torch_error": "OSError: libgomp.so.1: cannot open"}, ["torch cannot be imported (OSError: libgomp.so.1", "pip install"]),
    ],
)
def test_versions_that_do_not_do(torch, words):
    states(doctor_machine.packages(subject(torch=torch)), FINDING, *words)


def test_a_torch_that_cannot_be_imported_is_told_and_the_rest_goes_on(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    program = "import sys; sys.path.insert(0, sys.argv[1]); from common import torch_facts; print(torch_facts.facts())"
    answer = ask([sys.executable, "-c", program, str(tmp_path)], env=os.environ | {"PYTHONPATH": str(doctor_machine.REPOSITORY)})
    assert "'torch_error': 'OSError: libcudart.so.13: cannot open shared object file'" in answer.out, answer


def test_a_torch_that_takes_its_process_along_is_told_too(monkeypatch):
    monkeypatch.setattr(doctor, "ask", lambda *_, **__: ask(["sh", "-c", "kill -SEGV $$"]))
    rows, about = doctor.examine(None, False, None, ["versions"])
    states(rows[0], FINDING, "torch cannot be imported")


def test_backends():
    states(doctor_machine.backends(subject()), OK, "gloo", "a CPU build")
    states(doctor_machine.backends(subject(torch={"backends": ["nccl"]})), FINDING, "no gloo")
    states(doctor_machine.backends(Subject({}, torch={"torch_error": "x"})), UNCHECKED)


@pytest.mark.parametrize(
    ("ranks", "driver", "torch", "environment", "state", "words"),
    [
        (2, False, {}, {}, OK, ["no CUDA device"]),
        (2, True, {"gpus": ["H200"] * 2}, {}, OK, ["2 (H200) for 2 ranks"]),
        (3, True, {"gpus": ["H200"] * 2}, {}, FINDING, ["3 ranks and 2 GPUs", "Duplicate GPU", "export NPROC_PER_NODE=2"]),
        (2, True, {}, {}, FINDING, ["torch is a CPU build", "download.pytorch.org/whl/cu"]),
        (2, True, {"cuda": "13.0"}, {}, FINDING, ["its driver is older", "nvidia-smi"]),
        (
            2,
            True,
            {"cuda": "13.0"},
            {"CUDA_VISIBLE_DEVICES": ""},
            FINDING,
            ["hides this machine's GPUs", "unset CUDA_VISIBLE_DEVICES"],
        ),
    ],
)
def test_gpus(ranks, driver, torch, environment, state, words):
    states(doctor_machine.gpus(subject(ranks, torch=torch, **environment), driver), state, *words)


@pytest.mark.gpu
def test_more_ranks_than_gpus_here():
    facts = torch_facts.facts()
    row = doctor_machine.gpus(subject(len(facts["gpus"]) + 1, torch=facts))
    states(row, FINDING, f"export NPROC_PER_NODE={len(facts['gpus'])}")


# ------------------------------------------------------------------------------------------------ limits and cores


def test_shared_memory_of_this_machine_and_of_a_small_one(tmp_path):
    row = doctor_machine.shared_memory(subject())
    assert row.facts["bytes"] == os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize
    states(doctor_machine.shared_memory(subject(), str(tmp_path / "none")), UNCHECKED)


def in_namespaces(code, *before):
    """Runs Python where it may mount and name things as it likes, without a trace outside."""
    if lack := missing():
        pytest.skip(lack)
    words = ["unshare", "--mount", "--uts", "--net", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    program = f"{' && '.join([*before, 'exec'])} {sys.executable} -c {json.dumps(code)}"
    answer = ask([*words, "sh", "-ec", program], env=os.environ | {"PYTHONPATH": str(doctor_machine.REPOSITORY)})
    assert answer.status == 0, answer
    return answer.out


SHOW = "from common.doctor_rows import Subject; import {module} as m; row = m.{check}; print(row.state, row.found, '|', row.mend)"


@pytest.mark.only_on("linux")
def test_a_shared_memory_that_is_too_small():
    mount = "mount -t tmpfs -o size=64m tmpfs /dev/shm"
    out = in_namespaces(SHOW.format(module="common.doctor_machine", check="shared_memory(Subject({}), container=True)"), mount)
    assert "finding 64 MiB, 64 MiB of it free: too small for NCCL and for DataLoader workers (Bus error)" in out
    assert "docker run --shm-size=1g" in out
    mount = "mount -t tmpfs -o size=1500m tmpfs /dev/shm && fallocate -l 1400m /dev/shm/left"
    out = in_namespaces(SHOW.format(module="common.doctor_machine", check="shared_memory(Subject({}), container=False)"), mount)
    assert "finding 1,500 MiB, 100 MiB of it free: nearly full" in out


@pytest.mark.only_on("linux")
def test_a_limit_of_open_files_that_is_too_low():
    code = SHOW.format(module="common.doctor_machine", check="open_files(Subject({}))")
    env = os.environ | {"PYTHONPATH": str(doctor_machine.REPOSITORY)}
    low = ask(["prlimit", "--nofile=300:2000", sys.executable, "-c", code], env=env)
    assert low.out.startswith("finding 300 at most") and "| ulimit -n 1024" in low.out
    capped = ask(["prlimit", "--nofile=300:300", sys.executable, "-c", code], env=env)
    assert "sudo prlimit --pid $$ --nofile=1024:1024" in capped.out
    assert doctor_machine.open_files(subject()).state in (OK, FINDING)


@pytest.mark.only_on("linux")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core cannot be bound to fewer")
def test_a_shell_that_is_bound_to_one_core():
    first = min(os.sched_getaffinity(0))
    code = SHOW.format(module="common.doctor_machine", check="cores(Subject({}), quota=64)")
    out = ask(["taskset", "-c", str(first), sys.executable, "-c", code],
              env=os.environ | {"PYTHONPATH": str(doctor_machine.REPOSITORY)}).out  # fmt: skip
    assert out.startswith("finding 1 of ") and "bound to it and need not be | taskset -pc" in out, out


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_time_that_a_control_group_allows(tmp_path):
    own = tmp_path / "cgroup"
    write(own, "0::/docker/abc\n")
    assert doctor_machine.cpu_quota(str(own), str(tmp_path / "sys")) is None
    write(tmp_path / "sys/docker/abc/cpu.max", "max 100000\n")
    assert doctor_machine.cpu_quota(str(own), str(tmp_path / "sys")) is None
    write(tmp_path / "sys/docker/cpu.max", "150000 100000\n")  # of a group above
    assert doctor_machine.cpu_quota(str(own), str(tmp_path / "sys")) == 1.5
    write(own, "4:memory:/x\n3:cpu,cpuacct:/y\n0::/z\n")
    write(tmp_path / "sys/cpu,cpuacct/y/cpu.cfs_quota_us", "50000\n")
    write(tmp_path / "sys/cpu,cpuacct/y/cpu.cfs_period_us", "100000\n")
    assert doctor_machine.cpu_quota(str(own), str(tmp_path / "sys")) == 0.5
    assert doctor_machine.cpu_quota(str(tmp_path / "none")) is None
    row = states(doctor_machine.cores(subject(2), usable=8, quota=4.0), FINDING, "allows 4 cores' worth", "export THREADS=2")
    assert row.facts["quota"] == 4.0
    states(doctor_machine.cores(subject(2), usable=len(os.sched_getaffinity(0)), quota=999.0), OK)


@pytest.mark.parametrize(
    ("ranks", "usable", "environment", "state", "words"),
    [
        (2, 8, {}, OK, ["4 per rank"]),
        (4, 2, {}, OK, ["4 ranks share 2 cores"]),
        (2, 2, {"OMP_NUM_THREADS": "1"}, OK, []),
        (2, 2, {"OMP_NUM_THREADS": "4"}, FINDING, ["OMP_NUM_THREADS=4 × 2 ranks on 2 cores", "export OMP_NUM_THREADS=1"]),
        (2, 8, {"THREADS": "8"}, FINDING, ["THREADS=8 × 2 ranks", "export THREADS=4"]),
        (2, 2, {"OMP_NUM_THREADS": "4,2"}, FINDING, ["OMP_NUM_THREADS=4"]),
        (2, 2, {"THREADS": "as_shipped"}, OK, []),
    ],
)
def test_threads_times_ranks(ranks, usable, environment, state, words):
    states(doctor_machine.threads(subject(ranks, **environment), usable), state, *words)


# --------------------------------------------------------------------------------------- what earlier runs have left


@pytest.mark.parametrize(
    ("purpose", "environment", "left"),
    [
        (None, {}, []),
        (None, {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "lab1"}, ["RANK", "WORLD_SIZE", "MASTER_ADDR"]),
        (None, {"MASTER_ADDR": "lab1", "MASTER_PORT": "29500"}, []),
        (None, {"SLURM_PROCID": "0", "SLURM_CONF": "/etc/slurm.conf"}, ["SLURM_PROCID"]),
        ("slurm", {"SLURM_PROCID": "0"}, []),
        ("mpi", {"PMI_RANK": "0", "OMPI_COMM_WORLD_RANK": "1"}, []),
        (None, {"PMI_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1"}, ["OMPI_COMM_WORLD_SIZE", "PMI_RANK"]),
        ("docker", {"RANK": "0", "WORLD_SIZE": "2"}, []),
        ("ssh", {"LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, ["LOCAL_RANK", "TORCHELASTIC_RUN_ID"]),
        (None, {"RANK": ""}, []),
    ],
)
def test_variables_that_a_launcher_has_left(purpose, environment, left):
    row = doctor_machine.leftovers(subject(purpose=purpose, **environment))
    assert sorted(row.facts["names"]) == sorted(left), row
    states(row, FINDING if left else OK, *([f"unset {' '.join(left)}"] if left else []))


@pytest.mark.only_on("linux")
def test_a_rank_whose_launcher_is_gone():
    code = "import time; time.sleep(60)"
    start = f"{sys.executable} -c '{code}' >/dev/null 2>&1 & echo $!"  # the shell ends, and its child belongs to process 1
    env = os.environ | {"RANK": "1", "WORLD_SIZE": "2"}
    pid = int(subprocess.run(["sh", "-c", start], env=env, capture_output=True, text=True, timeout=20).stdout)
    try:
        until = time.monotonic() + 10
        while time.monotonic() < until and pid not in (row := doctor_machine.orphans(subject())).facts["pids"]:
            time.sleep(0.05)
        states(row, FINDING, "of a run whose launcher is gone", "kill ", str(pid))
    finally:
        os.kill(pid, signal.SIGKILL)


def test_no_proc_no_orphans(tmp_path):
    states(doctor_machine.orphans(subject(), tmp_path), UNCHECKED)


# ------------------------------------------------------------------------------------------------------- network


def test_a_port_that_is_taken_and_by_whom():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen(1)
        number = taken.getsockname()[1]
        row = states(doctor_network.port(subject(MASTER_PORT=str(number))), FINDING, f"{number} is taken", "export MASTER_PORT=")
        assert f"(pid {os.getpid()})" in row.found
        another = int(row.mend.rpartition("=")[2])
        with PortReservation(another):
            pass
    with PortReservation(0) as free:
        pass
    states(doctor_network.port(subject(MASTER_PORT=str(free))), OK if not doctor_network.listener(29500) else FINDING)
    with PortReservation(0) as free:
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("", free))
    states(doctor_network.port(subject(MASTER_PORT="http")), FINDING, "MASTER_PORT=http is no port", "unset MASTER_PORT")


MOUNTED = "echo '{text}' > /tmp/doctor-$$ && mount --bind /tmp/doctor-$$ {file} && rm /tmp/doctor-$$"
HOSTS = "hostname lab7 && " + MOUNTED.replace("{file}", "/etc/hosts")
FILES_ONLY = MOUNTED.format(text="hosts: files", file="/etc/nsswitch.conf")
CABLE = (
    "ip link add eth7 type veth peer name far; ip address add 10.9.8.7/24 dev eth7; "
    "ip link set eth7 up; ip link set far up; ip link set lo up"
)


@pytest.mark.only_on("linux")
@pytest.mark.parametrize(
    ("entry", "several", "said"),
    [
        ("127.0.0.1 localhost", False, "finding this machine's own name lab7 does not resolve"),
        ("127.0.0.1 localhost", True, '| echo "10.9.8.7 lab7" | sudo tee -a /etc/hosts'),
        ("127.0.1.1 lab7", False, "ok lab7 resolves to 127.0.1.1, the loopback interface; fine on one machine"),
        ("127.0.1.1 lab7", True, "(connection refused 127.0.0.1) | export GLOO_SOCKET_IFNAME=eth7"),
        ("10.9.8.7 lab7", True, "ok lab7 resolves to 10.9.8.7"),
    ],
)
def test_the_own_name(entry, several, said):
    code = SHOW.format(module="common.doctor_network", check=f"host_name(Subject({{}}, several={several}))")
    assert said in in_namespaces(code, HOSTS.format(text=entry), FILES_ONLY, CABLE)


@pytest.mark.only_on("linux")
def test_a_machine_without_a_way_out():
    code = SHOW.format(module="common.doctor_network", check="interface(Subject({}, several=True))")
    assert "finding no interface leads to other machines; this one has lo" in in_namespaces(code, "ip link set lo up")
    code = SHOW.format(module="common.doctor_network", check="interface(Subject({}, several=True))")
    assert "ok lo between the ranks of one machine; eth7 (10.9.8.7) to others" in in_namespaces(code, CABLE)


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(5) or [])
    began = time.monotonic()
    assert doctor_network.resolve("lab1", limit=0.2) == ([], "no answer within 0.2 s")
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("environment", "state", "words"),
    [
        ({}, OK, ["lo"]),
        ({"GLOO_SOCKET_IFNAME": "lo"}, OK, ["GLOO_SOCKET_IFNAME=lo is there"]),
        ({"GLOO_SOCKET_IFNAME": "wlan7"}, FINDING, ["GLOO_SOCKET_IFNAME=wlan7: no such interface", "unset GLOO_SOCKET_IFNAME"]),
        ({"NCCL_SOCKET_IFNAME": "l"}, OK, []),
        ({"NCCL_SOCKET_IFNAME": "=l"}, FINDING, ["unset NCCL_SOCKET_IFNAME"]),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, OK, []),
        ({"NCCL_SOCKET_IFNAME": "ib"}, FINDING, ["NCCL_SOCKET_IFNAME=ib: no such interface"]),
    ],
)
@pytest.mark.only_on("linux")
def test_the_interface_that_was_asked_for(environment, state, words):
    states(doctor_network.interface(subject(**environment)), state, *words)


NFT = "table inet f {{\n\tchain input {{\n\t\ttype filter hook input priority filter; {}\n\t\t{}\n\t}}\n}}\n"


@pytest.mark.parametrize(
    ("program", "text", "closed"),
    [
        ("iptables", "-P INPUT ACCEPT\n", ""),
        ("iptables", "-P INPUT DROP\n-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\n", "iptables: -P INPUT DROP"),
        ("iptables", "-P INPUT ACCEPT\n-A INPUT -j REJECT --reject-with icmp-host-prohibited\n", "-j REJECT"),
        ("iptables", "-P INPUT ACCEPT\n-A INPUT -p tcp -m tcp --dport 29500 -j DROP\n", "--dport 29500 -j DROP"),
        ("iptables", "-P INPUT ACCEPT\n-A INPUT -p tcp -m tcp --dport 23 -j DROP\n", ""),
        ("iptables", "-P INPUT ACCEPT\n-A INPUT -p tcp -m tcp --dport 1024:65535 -j DROP\n", "1024:65535"),
        ("iptables", "-P INPUT ACCEPT\n-A INPUT -s 192.0.2.66/32 -j DROP\n", ""),
        ("nft", NFT.format("policy drop;", ""), "policy drop"),
        ("nft", NFT.format("policy accept;", "tcp dport { 22, 80 } accept\n\t\treject with icmpx admin-prohibited"), "reject"),
        ("nft", NFT.format("policy accept;", "ip saddr 192.0.2.66 drop"), ""),
        ("nft", NFT.format("policy accept;", "tcp dport 29000-29999 counter packets 0 bytes 0 drop"), "29000-29999"),
        ("nft", NFT.format("policy drop;", "").replace("input", "forward"), ""),
        ("nft", NFT.format("policy accept;", "").replace("\t}\n}", "\t}\n\tchain other {\n\t\tdrop\n\t}\n}"), ""),
    ],
)  # fmt: skip
def test_rules_that_keep_others_out(program, text, closed):
    verdict = doctor_network.closes(program, text)
    assert closed in verdict if closed else not verdict
    row = doctor_network.firewall(subject(several=True), {program: text})
    states(row, FINDING if closed else OK, *(["sudo iptables -I INPUT -s "] if closed else []))
    states(doctor_network.firewall(subject(), {program: text}), OK)  # on one machine all goes over lo


@pytest.mark.only_on("linux")
@pytest.mark.parametrize(
    "rules",
    [
        "iptables -P INPUT DROP",
        "nft 'add table ip f; add chain ip f c { type filter hook input priority 0; policy drop; }'",
        "nft 'add table ip f; add chain ip f c { type filter hook input priority 0; }; add rule ip f c tcp dport 29500 reject'",
        "iptables -A INPUT -p tcp --dport 29500 -j REJECT",
    ],
)
def test_a_real_firewall(rules):
    code = SHOW.format(module="common.doctor_network", check="firewall(Subject({'PATH': '/usr/bin:/bin'}, several=True))")
    out = in_namespaces(code, f"PATH=$PATH:/usr/sbin:/sbin; {rules}", CABLE)
    assert "finding" in out and "gloo and NCCL need more ports than 29500" in out, out
    assert "| sudo iptables -I INPUT -s 10.9.8.0/24 -p tcp -j ACCEPT" in out
    assert "ok no rule keeps others out" in in_namespaces(code, CABLE)


# --------------------------------------------------------------------------------------------------- MPI and tools


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.launch
def test_this_environments_mpi():
    row = doctor_mpi.mpi(
        subject(purpose="mpi", torch=torch_facts.facts(), PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    )
    assert row.state in (OK, FINDING) and len(row.facts["ranks"]) == 2, row
    assert {tuple(rank[:3]) for rank in row.facts["ranks"]} == {(0, 2, 3), (1, 2, 3)}


@pytest.mark.launch
def test_an_mpirun_that_does_not_fit_mpi4py(tmp_path):
    """Debian's Open MPI starts ranks, and the MPICH beside this Python knows nothing of it."""
    if not Path("/usr/bin/mpirun").exists():
        pytest.skip("no other mpirun here: apt install openmpi-bin")
    script(tmp_path / "mpirun", 'exec /usr/bin/mpirun "$@"')
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    about = Subject({"PATH": f"{tmp_path}:/usr/bin:/bin", **root}, "mpi", torch=torch_facts.facts())
    row = states(doctor_mpi.mpi(about), FINDING, "does not fit mpi4py, which loads MPICH", "of two ranks")
    assert row.mend == f"export PATH={Path(sys.executable).parent}:$PATH"


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ("echo mpirun has detected an attempt to run as root. You can use --allow-run-as-root >&2; exit 1",
         ["does not start ranks for root", "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"]),
        ("echo There are not enough slots available in the system >&2; exit 1", ["has not enough slots", ":oversubscribe"]),
        ("echo it broke >&2; exit 3", ["two ranks did not start (it broke)", "pip install"]),
    ],
)  # fmt: skip
def test_an_mpirun_that_starts_nothing(tmp_path, says, words):
    title = doctor_mpi.family(ask([sys.executable, "-c", doctor_mpi.LIBRARY]).out) + " 9.9.9"
    script(tmp_path / "mpirun", f'[ "$1" = --version ] && echo "{title}" && exit\n{says}')
    row = states(doctor_mpi.mpi(subject(PATH=f"{tmp_path}:/usr/bin:/bin")), FINDING, f"({title})", *words)
    assert str(tmp_path / "mpirun") in row.found


def test_without_mpi(tmp_path):
    states(doctor_mpi.mpi(subject(PATH=str(tmp_path))), UNCHECKED, "needed for mpi.py only")
    states(doctor_mpi.mpi(subject(PATH=str(tmp_path), purpose="mpi")), FINDING, "mpirun is not on PATH")
    states(doctor_mpi.mpi(subject(purpose="mpi", torch={"mpi4py": None})), FINDING)


def test_ranks_that_mpirun_has_bound():
    cores = sorted(os.sched_getaffinity(0))
    ranks = [[0, 2, 3, "MPICH", "", cores[:1]], [1, 2, 3, "MPICH", "", cores[:1]]]
    row = doctor_mpi._two_ranks(subject(), "mpirun", ranks, {})
    states(row, FINDING if len(cores) > 1 else OK)
    if len(cores) > 1:
        assert f"binds each rank to 1 of {len(cores)} cores" in row.found and "HYDRA_BINDING=none" in row.mend
    states(doctor_mpi._two_ranks(subject(), "mpirun", [[0, 2, 3, "M", "", cores]] * 2, {}), OK, "fit")


def test_torchrun_of_another_python(tmp_path):
    states(doctor_tools.torchrun(subject(PATH=str(Path(sys.executable).parent))), OK, "is this Python's")
    script(tmp_path / "torchrun", "")
    row = doctor_tools.torchrun(subject(PATH=f"{tmp_path}:/usr/bin"))
    states(row, FINDING, f"{tmp_path}/torchrun is not of {sys.executable}", f"export PATH={Path(sys.executable).parent}:$PATH")
    states(doctor_tools.torchrun(subject(PATH="/nowhere", purpose="torchrun")), FINDING, "torchrun is not on PATH")


@pytest.mark.parametrize(
    ("check", "purpose", "told"),
    [(doctor_tools.ssh, "ssh", "apt install openssh-client"), (doctor_tools.slurm, "slurm", "apt install slurm-wlm"),
     (doctor_tools.docker, "docker", "apt install podman")],
)  # fmt: skip
def test_a_tool_that_is_not_here_matters_to_who_wants_it(check, purpose, told):
    states(check(subject(PATH="/nowhere", purpose=purpose)), FINDING, told)
    states(check(subject(PATH="/nowhere")), UNCHECKED, f"needed for {purpose} only")


def test_tools_that_answer_and_tools_that_do_not(tmp_path):
    script(tmp_path / "srun", "")
    script(tmp_path / "sinfo", "echo '2 idle'; echo '1 down'")
    states(doctor_tools.slurm(subject(PATH=f"{tmp_path}:/bin")), OK, "3 nodes: 2 idle, 1 down")
    script(tmp_path / "sinfo", "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1")
    states(doctor_tools.slurm(subject(PATH=f"{tmp_path}:/bin", purpose="slurm")), FINDING, "Unable to contact", "scontrol ping")
    script(tmp_path / "docker", "echo 'Cannot connect to the Docker daemon' >&2; exit 1")
    states(doctor_tools.docker(subject(PATH=str(tmp_path), purpose="docker")), FINDING, "Cannot connect", "systemctl start docker")
    script(tmp_path / "podman", "echo 4.3.1")
    states(doctor_tools.docker(subject(PATH=str(tmp_path))), OK, "podman 4.3.1", "--network host")


# ----------------------------------------------------------------------------------------------- two ranks' all-reduce


@pytest.mark.launch
def test_two_real_ranks():
    row = doctor_ranks.all_reduce(subject(), str(doctor_machine.REPOSITORY))
    assert "1 MB in" in row.found and 0 < row.facts["seconds"] < 5, row


@pytest.mark.launch
def test_ranks_that_cannot_join():
    row = doctor_ranks.all_reduce(
        Subject({"PATH": "/usr/bin:/bin", "PYTHONSTARTUP": "", "OMP_NUM_THREADS": "1"}, torch=GOOD), "/nowhere"
    )
    states(row, FINDING, "no all-reduce over lo", "--inspect")


def test_what_an_all_reduce_tells():
    states(doctor_ranks.judge([{"seconds": 0.001, "right": True}] * 2, "two", "lo"), OK, "1 MB in 1.0 ms (two, lo)")
    slow = doctor_ranks.judge([{"seconds": 0.001, "right": True}, {"seconds": 0.2, "right": True}], "two", "eth0")
    states(slow, FINDING, "1 MB in 200.0 ms", "may be slower than one process", "COMPRESS=fp16")
    states(doctor_ranks.judge([{"seconds": 0.001, "right": False}], "two", "lo"), FINDING, "a wrong sum")
    states(doctor_ranks.all_reduce(Subject({}, torch={"torch_error": "x"}), "."), UNCHECKED)


# ----------------------------------------------------------------------------------------------------- the program


ROWS = [
    ok("port", "29500 is free"),
    finding("host name", "lab1 " + "is long " * 20, "echo " + "x" * 150),
    unchecked("clock", "one host"),
]


def test_what_a_person_sees():
    lines = doctor.shown(ROWS, 100, False).splitlines()
    assert lines[0] == "ok           port       29500 is free"
    assert lines[1] == "not checked  clock      one host"
    assert lines[2].startswith("finding      host name  lab1 is long")
    mend = [line for line in lines if "echo" in line]
    assert len(mend) == 1 and mend[0].strip() == "echo " + "x" * 150  # to be copied: never broken
    assert all(len(line) <= 100 for line in lines if line not in mend)
    assert "\033[" in doctor.shown(ROWS, 100, True) and "\033[" not in doctor.shown(ROWS, 100, False)


def test_status_and_json(capsys):
    assert doctor.report(ROWS, subject(), True) == 1
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"host", "time", "for", "nproc_per_node", "findings", "machine", "rows"} and told["findings"] == 1
    assert set(told["rows"][0]) == {"check", "state", "found", "mend", "host", "facts"}
    assert Row(**told["rows"][1]) == ROWS[1]
    assert doctor.report([ROWS[0], ROWS[2]], subject(), False) == 0
    assert "no findings, 1 ok, 1 not checked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--for", "kubernetes"], "invalid choice: 'kubernetes'"),
        (["--only", "weather"], "--only weather: no such check; there are versions, "),
        (["--nproc_per_node", "0"], "--nproc_per_node 0: not allowed"),
        (["--hosts", "/nowhere/hosts.txt"], "/nowhere/hosts.txt: cannot be read"),
        (["--colour"], "--colour"),
    ],
)
def test_bad_usage(argv, said):
    with pytest.raises(UsageError) as refused:
        doctor.main(argv)
    assert said in str(refused.value)


def program(*flags, cwd=None, **environment):
    words = [sys.executable, "-m", "common.doctor", *flags]
    env = {n: v for n, v in os.environ.items() if n not in HELD} | {"PYTHONPATH": str(doctor_machine.REPOSITORY)} | environment
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=100)


def test_the_program_as_a_user_types_it(tmp_path):
    good = program("--only", "variables", "settings", cwd=tmp_path)
    assert (good.returncode, good.stderr) == (0, "") and "no findings, 2 ok, 0 not checked" in good.stdout
    bad = program("--only", "variables", cwd=tmp_path, RANK="0")
    assert bad.returncode == 1 and "unset RANK" in bad.stdout
    refused = program("--only", "nonsense")
    assert refused.returncode == 2 and refused.stderr.startswith("error: --only nonsense") and len(refused.stderr.splitlines()) == 1
    (tmp_path / ".env").write_text("this is no setting\n")
    spoilt = program("--only", "settings", "--json", cwd=tmp_path)
    assert spoilt.returncode == 1 and "is no NAME=value" in json.loads(spoilt.stdout)["rows"][0]["found"]


@pytest.mark.launch
def test_all_of_it_is_quick_and_says_what_it_did_not_check(tmp_path):
    began = time.monotonic()
    told = program("--json", cwd=tmp_path)
    seconds = time.monotonic() - began
    rows = {row["check"]: row for row in json.loads(told.stdout)["rows"]}
    assert set(rows) == {*doctor.CHECKS, "settings", "clock", "reachability"} and not told.stderr
    assert rows["clock"]["found"] == "it takes several hosts: give --hosts hosts.txt"
    assert told.returncode == int(any(row["state"] == FINDING for row in rows.values()))
    assert seconds < 40  # 4 s on two free cores; tests share theirs
    assert not [row for row in rows.values() if "the check itself failed" in row["found"]]


@pytest.mark.parametrize("purpose", doctor.PURPOSES)
def test_what_a_way_of_launching_does_not_need_is_left_out(purpose):
    names = set(doctor.wanted(purpose, []))
    assert purpose in names and not names & (doctor._TOOLS - {purpose})


def test_a_check_that_fails_spoils_no_other(monkeypatch):
    monkeypatch.setitem(doctor.CHECKS, "port", lambda subject: 1 / 0)
    rows, _ = doctor.examine(None, False, 2, ["port", "threads"])
    assert [(row.check, row.state) for row in rows] == [("port", UNCHECKED), ("threads", OK)]
    assert rows[0].found == "the check itself failed (ZeroDivisionError: division by zero)"


def test_a_command_is_ended_with_all_that_it_started(tmp_path):
    answer = ask(["sh", "-c", f"sleep 50 & echo $! > {tmp_path}/pid; wait"], limit=0.5)
    assert answer.status is None and answer.why == "did not end within 0.5 s"
    pid = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 5
    while time.monotonic() < until and Path(f"/proc/{pid}/stat").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text():
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}/stat").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text()
    assert ask(["/nowhere/to/be/found"]).why == "No such file or directory"
