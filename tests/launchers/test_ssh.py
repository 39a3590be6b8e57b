"""ssh.py on real hosts with real sshds: it trains as one process does, says what is wrong with all hosts, and leaves nothing."""

import json
import re
import shutil
import subprocess
import sys
import time

import pytest
from running import MARKER, ROOT, Run, cluster, command, trained

pytestmark = [pytest.mark.launch, pytest.mark.only_on("linux")]
SSH = [sys.executable, str(ROOT / "launchers" / "ssh.py")]
SMALL = ["--job", "random", "--data_size", "128", "--epochs", "2"]
ENDLESS = ["--job", "random", "--data_size", "128", "--epochs", "1000000"]
GONE_S = 15.0  # every process on every host, after any end
MODEL = """
import os, time
import torch

class Fails(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(20, 2)
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.calls == 3 and torch.distributed.get_rank() == 2:
            raise ValueError("no such luck")
        return self.layer(x)
"""


@pytest.fixture(scope="module")
def lab():
    """A desk, where people sit, and two hosts to train on."""
    with cluster(3, names=["desk", "lab1", "lab2"], ssh=True) as hosts:
        yield hosts


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "hosts.txt").write_text("# the lab\nlab1 slots=2   # Open MPI's\nlab2:1         # MPICH's\n")
    return tmp_path


def on_desk(lab, folder, *words, on="desk", **env):
    """ssh.py there; what it starts on the hosts is known by the run's mark, too, because that is exported."""
    mark = ["--export", MARKER] if words[:1] != ("--help",) else []
    return Run(lab.command(on, [*SSH, *map(str, words), *mark], cwd=folder), cwd=folder, **env)


def gone(run, seconds=GONE_S):
    """Waits until nothing of the run is left on any host."""
    began = time.monotonic()
    left = [f"{p.pid} {' '.join(p.cmdline())}" for p in run.left_after(seconds)]
    assert not left, left
    return time.monotonic() - began


def training(run):
    """Waits until both hosts train: rank 0, which tells of it, cannot without the others."""
    run.until(lambda: re.search(r"^\[lab1\] Epoch \[3/", run.out, re.MULTILINE), "training")


def process(run, *words, isolated=False):
    """The one Python process of the run, started with -S or without, whose command line has all of ``words``."""
    found = []
    for each in run.processes():
        line = each.cmdline()
        here = all(any(word in part for part in line) for word in words) and "python" in line[0]
        if here and ("-S" in line) == isolated and not any("virtual_host.py" in part for part in line):
            found.append(each)
    assert len(found) == 1, [each.cmdline() for each in found]
    return found[0]


def test_it_computes_what_one_process_computes(lab, folder):
    flags = ["--job", "random", "--data-size", "300", "--epochs", "3", "--precision=fp64", "--global_batch_size", "32"]
    run = on_desk(lab, folder, *flags, "--result", "hosts.json", LEARNING_RATE=0.05)
    ended = run.finish()
    assert ended.status == 0, ended
    many = json.loads((folder / "hosts.json").read_text())
    alone = trained(command("plain", 1, *flags), folder / "alone.json", cwd=folder, LEARNING_RATE=0.05)
    assert many["world_size"] == 3 and many["hosts"] == ["lab1", "lab1", "lab2"] and many["learning_rate"] == 0.05
    for curve in ("loss_per_step", "eval_loss_per_epoch"):
        assert many[curve] == pytest.approx(alone[curve], rel=1e-9), curve
    ranks = re.findall(r"^\[(\w+)\] \[Rank (\d)\] Process initialized on (\w+), local_rank: (\d), world_size: 3$", ended.out, re.M)
    assert sorted(ranks) == [("lab1", "0", "lab1", "0"), ("lab1", "1", "lab1", "1"), ("lab2", "2", "lab2", "0")]
    assert ended.err == "", "nothing is wrong, so nothing is said"


def test_the_words_of_the_command_line_name_hosts_too(lab, tmp_path):
    words = ["--mode", "multi-node", "--master-node", "root@lab2", "--worker-nodes", "lab1", "--gpus-per-node", 2, "--port", 29611]
    ended = on_desk(lab, tmp_path, *words, *SMALL, "--result", "r.json").finish()
    assert ended.status == 0, ended
    assert json.loads((tmp_path / "r.json").read_text())["hosts"] == ["lab2", "lab2", "lab1", "lab1"]


def test_one_node_needs_no_ssh(tmp_path):
    run = Run([*SSH, "--mode", "single-node", "--gpus", "2", *SMALL, "--result", "r.json"], cwd=tmp_path)
    ended = run.finish()
    assert ended.status == 0 and ended.out.startswith("[Rank "), ended
    assert json.loads((tmp_path / "r.json").read_text())["world_size"] == 2


def problems(ended):
    assert ended.status == 2 and ended.out == "" and "Traceback" not in ended.err, ended
    return ended.err.splitlines()


def test_all_problems_of_all_hosts_are_told_at_once(lab, tmp_path):
    (tmp_path / "hosts.txt").write_text("lab1\nlab2 port=23\nnowhere\n\nghost@desk\n192.0.2.1 # no such network\n")
    copy = tmp_path / "a folder" / "copy"
    for part in ("common", "launchers"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "common" / "loop.py").open("a") as file:
        file.write("# mine\n")
    ended = on_desk(lab, tmp_path, *SMALL, "--mode", "multi-node", "--remote_dir", copy, "--ssh_timeout", 5).finish()
    rows = problems(ended)
    assert len(rows) == 5, ended
    assert re.fullmatch(
        r"error: lab1 \(line 1\): other code in .*/a folder/copy: commit unknown there, \w+ here; not the same: common/loop.py; .*",
        rows[0],
    ), rows
    assert rows[1].startswith("error: lab2 port 23 (line 2): no sshd answers there: start it"), rows
    assert rows[2].startswith("error: nowhere (line 3): nobody knows this name: mend it in the hosts file"), rows
    assert rows[3].startswith("error: desk (line 5): it lets in none of the keys offered: ssh-copy-id ghost@desk"), rows
    assert re.match(r"error: 192\.0\.2\.1 \(line 6\): (it does not answer|no answer within 5 s|no route leads there)", rows[4]), (
        rows
    )


def test_what_is_missing_on_a_host(lab, folder):
    rows = problems(on_desk(lab, folder, *SMALL, "--remote_dir", "/no/such", "--remote_python", "/usr/bin/python3").finish())
    assert [row.partition(";")[0][:60] for row in rows if "no LaunchLab in /no/such there" in row], rows
    assert sum("no torch in /usr/bin/python3: make the environment there" in row for row in rows) == 2, rows
    rows = problems(on_desk(lab, folder, *SMALL, "--remote_python", "/no/python").finish())
    assert rows == [
        f"error: {host}: no Python at /no/python there: make the environment (./setup.sh), or name it with --remote_python"
        for host in ("lab1 (line 2)", "lab2 (line 3)")
    ]


def listening(lab, host, port):
    """A program that has this port on that host, once it has it."""
    code = f"import socket, time; s = socket.create_server(('', {port})); print('up', flush=True); time.sleep(600)"
    process = lab.popen(host, [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    return process


def test_a_port_that_is_taken(lab, folder):
    taken = listening(lab, "lab1", 29500)
    try:
        rows = problems(on_desk(lab, folder, *SMALL, "--port", 29500).finish())
        assert rows == ["error: lab1 (line 2): --port 29500: cannot be used there (Address already in use); give another, or none"]
        ended = on_desk(lab, folder, *SMALL).finish()
        assert ended.status == 0 and "[Rank 2]" in ended.out, ended
    finally:
        taken.kill()
        taken.communicate()


def test_hosts_that_do_not_reach_each_other(lab, folder):
    """The desk reaches both, but no packet goes from lab2 to lab1."""
    route = ["ip", "route", "add", "prohibit", f"{lab.addresses['lab1']}/32"]
    assert lab.run(route, on="lab2")["lab2"].returncode == 0
    try:
        rows = problems(on_desk(lab, folder, *SMALL).finish())
        assert len(rows) == 1, rows
        assert re.match(
            r"error: lab2 \(line 3\): it cannot reach port 29500 of lab1 \(lab1: .*\): let it through the firewall", rows[0]
        )
    finally:
        assert lab.run(["ip", "route", "del", *route[3:]], on="lab2")["lab2"].returncode == 0


def test_a_master_whose_name_is_another_for_the_others(lab, folder):
    """Debian's habit, and names that only the desk knows: the address is taken that the hosts do reach."""
    hosts = lab.folder / "lab2.hosts"
    text = hosts.read_text()
    try:
        hosts.write_text(text.replace(f"{lab.addresses['lab1']} lab1", "127.0.1.1 lab1"))
        ended = on_desk(lab, folder, *SMALL).finish()
        assert ended.status == 0 and "[Rank 2]" in ended.out, ended
    finally:
        hosts.write_text(text)


def test_ctrl_c(lab, folder):
    run = on_desk(lab, folder, *ENDLESS)
    training(run)
    run.interrupt()
    assert run.process.wait(GONE_S) == 130
    gone(run, 1)
    ended = run.finish()
    assert ended.err == "", ended


def test_a_launcher_that_is_killed(lab, folder):
    run = on_desk(lab, folder, *ENDLESS)
    training(run)
    process(run, "launchers/ssh.py").kill()
    print(f"all gone after {gone(run):.1f} s")
    assert run.finish().status != 0


@pytest.mark.parametrize(
    "what, words", [("agent", ("quiet_torchrun.py", "--node_rank=1")), ("guard", ("remote_guard.py", "--node_rank=1"))]
)
def test_an_agent_or_a_guard_that_is_killed(lab, folder, what, words):
    run = on_desk(lab, folder, *ENDLESS)
    training(run)
    process(run, *words, isolated=what == "guard").kill()
    ended = run.finish(30)
    assert ended.status == 1, ended
    assert re.search(
        r"^ssh\.py: node \d \(lab\d\) (ended first, with|gave no status: ).*; ending the other node\.$", ended.err, re.M
    ), ended
    if what == "agent":
        assert "[lab2] remote_guard.py: the command was killed by SIGKILL" in ended.err, ended


def test_a_link_that_is_cut(lab, folder):
    run = on_desk(lab, folder, *ENDLESS)
    training(run)
    try:
        lab.cut("lab2")
        print(f"all gone after {gone(run):.1f} s")
        ended = run.finish()
    finally:
        lab.heal("lab2")
    assert ended.status == 1, ended
    assert (
        "ssh.py: node 1 (lab2) gave no status: the connection is lost, or its guard was killed; ending the other node.\n"
        in ended.err
    ), ended


def test_a_rank_that_fails(lab, folder):
    (folder / "broken.py").write_text(MODEL)
    began = time.monotonic()
    ended = on_desk(lab, folder, *ENDLESS, "--model", "broken:Fails").finish()
    assert ended.status == 1, ended
    assert len(re.findall(r"^\[lab2\] Rank 2 on lab2 \(pid \d+\) failed: ValueError: no such luck", ended.err, re.M)) == 1, ended
    assert (
        len(re.findall(r"^ssh\.py: node \d \(lab\d\) ended first, with exit status 1; ending the other node\.$", ended.err, re.M))
        == 1
    ), ended
    assert "ChildFailedError" not in ended.err and ended.err.count("Traceback") == 1, ended
    assert time.monotonic() - began < 60


def test_what_the_ranks_refuse_is_bad_input(lab, folder):
    ended = on_desk(lab, folder, *SMALL, "--dataset", "nobody:Knows").finish()
    assert ended.status == 2, ended
    errors = re.findall(r"^(?:\[lab\d\] )?error: .*$", ended.err, re.M)
    assert errors and "nobody" in errors[0] and "Traceback" not in ended.err, ended


def test_what_print_shows_trains_when_it_is_typed(lab, folder):
    ended = on_desk(lab, folder, "--print", *SMALL, "--result", "r.json", EPOCHS=1, BATCH_SIZE=16).finish()
    assert ended.status == 0, ended
    shown = re.findall(r"^# node (\d), on (\w+):\n(.+)$", ended.out, re.M)
    assert [(node, name) for node, name, _ in shown] == [("0", "lab1"), ("1", "lab2")]
    runs = [Run(lab.command(name, ["sh", "-c", line], cwd="/"), cwd=folder) for _, name, line in shown]
    assert [run.finish().status for run in runs] == [0, 0], [str(run.ended()) for run in runs]
    result = json.loads((folder / "r.json").read_text())
    assert result["hosts"] == ["lab1", "lab1", "lab2"] and result["epochs"] == 2 and result["global_batch_size"] == 48


def test_start_multi_node_by_hand(lab, folder):
    script = str(ROOT / "start_multi_node.sh")
    parts = {"lab1": ["master"], "lab2": ["worker"]}
    runs = [
        Run(lab.command(name, [script, *words, *SMALL, "--result", "r.json"], cwd=folder), cwd=folder)
        for name, words in parts.items()
    ]
    assert [run.finish().status for run in runs] == [0, 0], [str(run.ended()) for run in runs]
    assert json.loads((folder / "r.json").read_text())["hosts"] == ["lab1", "lab1", "lab2"]
    refused = Run([script, "boss"], cwd=folder).finish()
    assert refused.status == 2 and refused.err.startswith("error: boss given; usage: ./start_multi_node.sh master|worker"), refused
