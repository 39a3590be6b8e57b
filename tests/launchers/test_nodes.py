"""Several hosts: any order of starting, one process's loss, and a failure on one is told on all and leaves nothing on any."""

import itertools
import json
import re
import time

import pytest
from running import BIN, MARKER, ROOT, Run, cluster
from test_endings import CAUSES, LONG, MAY_BE_UNSEEN, MODEL
from test_parity import JOBS, STEPS, difference

from common.watch_link import GONE, SILENT_S

pytestmark = [
    pytest.mark.launch,
    pytest.mark.only_on("linux"),
]

PROMISED_S = 5.0
CUT_S = SILENT_S + PROMISED_S
QUICK = ("--job", "random", "--data_size", 128, "--epochs", 2, "--threads", 1)
ports = itertools.count(29500)  # a new one for each run: a cut connection may stay for minutes


@pytest.fixture(scope="module")
def three():
    """Three hosts that all tests share which kill none."""
    with cluster(3) as hosts:
        yield hosts


class Nodes:
    """One command a host, of which each belongs to the same run."""

    def __init__(self, hosts, folder, nodes=2, per_node=2):
        self.hosts, self.folder, self.nodes, self.per_node, self.port = hosts, folder, nodes, per_node, next(ports)
        self.runs = {}
        self.agent_flags = ()

    def words(self, launcher, node, *flags):
        path = str(ROOT / "launchers" / f"{launcher.partition(' ')[0]}.py")
        address = self.hosts.names[0]
        agent = ["torchrun", *self.agent_flags, f"--nnodes={self.nodes}", f"--nproc_per_node={self.per_node}"]
        words = {
            "torchrun": [*agent, f"--node_rank={node}", f"--master_addr={address}", f"--master_port={self.port}", path],
            "torchrun c10d": [*agent, "--rdzv_backend=c10d", f"--rdzv_endpoint={address}:{self.port}", "--rdzv_id=test", path],
        }.get(launcher)
        if words is None:
            words = ["python", path, "--nnodes", self.nodes, "--nproc_per_node", self.per_node]
            words += ["--master_addr", address, "--master_port", self.port]
            words += self.agent_flags if launcher == "elastic" else ["--node_rank", node]
        return [str(word) for word in (*words, *flags)]

    def start(self, launcher, *flags, order=None, **env):
        """Starts a launcher on the hosts; ``order`` of node indices."""
        for node in order or range(self.nodes):
            name = self.hosts.names[node]
            words = self.hosts.command(name, self.words(launcher, node, *flags), cwd=self.folder)
            self.runs[node] = Run(words, self.folder, **env)
        return self

    def __getitem__(self, node):
        return self.runs[node]

    def finish(self, limit=120):
        """How each ended, by node; nothing may be left."""
        try:
            return [self.runs[node].finish(limit) for node in sorted(self.runs)]
        except pytest.fail.Exception as failure:  # the reason may be in what another node said
            said = [f"==== node {node}\n{self.runs[node].ended()}" for node in sorted(self.runs)]
            pytest.fail("\n".join([str(failure), *said]))

    def fail(self, launcher, fault, peers, *flags, who=None, **env):
        """Runs a model that fails on the last rank; how each ended, and the seconds from the fault until nothing was left."""
        (self.folder / "broken.py").write_text(MODEL)
        who = self.nodes * self.per_node - 1 if who is None else who
        job = ("--job", "random", "--model", "broken:Fails", "--threads", 1)
        self.start(launcher, *job, *flags, FAULT=fault, PEERS=peers, WHO=who, **env)
        failed = self.folder / "failed"
        self[0].until(failed.exists, "the fault")
        return self.gone_since(float(failed.read_text().split()[1]))

    def gone_since(self, at, limit=60):
        while any(run.processes() for run in self.runs.values()) and time.monotonic() < at + limit:
            time.sleep(0.05)
        seconds = time.monotonic() - at
        return self.finish(), seconds


@pytest.fixture
def nodes(three, tmp_path):
    """Makes runs on the shared cluster."""
    return lambda *sizes: Nodes(three, tmp_path, *sizes)


def spoke(rank, host, cause, ended):
    """Whether this one sentence, and none about another rank, was said."""
    said = re.findall(r"Rank (\d+) on (\S+) \(pid \d+\) (?!waits)(.*)", ended.err)
    assert [(int(number), where) for number, where, _ in said] == [(rank, host)], str(ended)
    unseen = MAY_BE_UNSEEN and not cause.startswith("failed") and said[0][2].startswith("ended without a word")
    assert said[0][2].startswith(cause) or unseen, str(ended)
    blamed = re.findall(r"(?:spawn|plain|elastic)\.py(?: \(node (\d)\))?: rank (\d+) ended first", ended.err)  # of its own node
    assert all(f"node{int(node) + 1}" != host or number == str(rank) for node, number in blamed), str(ended)


# ------------------------------------------------------------------------------------------------- training

PARITY = ("--job", "random", *JOBS["random"], "--precision", "fp64", "--threads", 1)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process computes."""
    file = tmp_path_factory.mktemp("alone") / "result.json"
    run = Run(["python", str(ROOT / "launchers/plain.py"), *map(str, PARITY), "--result", str(file)])
    assert run.finish().status == 0 and not run.close()
    return json.loads(file.read_text())


def same_loss(folder, alone, ranks):
    many = json.loads((folder / "result.json").read_text())
    assert many["world_size"] == ranks and len(many["loss_per_step"]) == STEPS["random"]
    for curve in ("loss_per_step", "train_loss_per_epoch", "eval_loss_per_epoch"):
        assert difference(many[curve], alone[curve]) < 1e-9, curve


@pytest.mark.parametrize(
    "launcher, sizes",
    [("spawn", (2, 2)), ("spawn", (3, 1)), ("plain", (2, 1)), ("torchrun", (2, 2)), ("torchrun c10d", (2, 2)), ("elastic", (2, 2))],
)
def test_the_loss_is_one_process_s(nodes, tmp_path, alone, launcher, sizes):
    started = nodes(*sizes).start(launcher, *PARITY, "--result", tmp_path / "result.json")
    for ended in started.finish():
        assert ended.status == 0, str(ended)
    same_loss(tmp_path, alone, sizes[0] * sizes[1])
    assert f"{sizes[0] * sizes[1]} ranks on {sizes[0]} nodes" in started[0].out
    if not launcher.startswith("torchrun"):
        assert not [row for row in (started[0].err + started[1].err).splitlines() if " waits for " not in row]


def test_a_node_that_comes_first_waits_and_says_for_whom(nodes, tmp_path, alone):
    started = nodes(3, 1)
    flags = (*PARITY, "--result", tmp_path / "result.json")
    started.start("spawn", *flags, order=[2])
    line = f"Rank 2 on node3 waits for rank 0 at node1:{started.port} (up to 600 s, --timeout)\n"
    started[2].until(lambda: started[2].err == line, "the line of rank 2")
    started.start("spawn", *flags, order=[0])
    line = "Rank 0 on node1 waits for rank 1 (up to 600 s, --timeout)\n"
    started[0].until(lambda: started[0].err == line, "the line of rank 0")
    started.start("spawn", *flags, order=[1])
    for ended in started.finish():
        assert ended.status == 0 and ended.err.count("waits for") <= 2, str(ended)
    same_loss(tmp_path, alone, 3)


def test_who_never_comes_is_named_on_every_node(nodes):
    started = nodes(3, 2).start("spawn", *QUICK, "--timeout", 4, order=[1, 0])
    for ended, _ in zip(started.finish(), (0, 1), strict=True):
        assert ended.status == 1, str(ended)
        assert "ranks 4, 5 of 6 did not arrive within 4 s (--timeout)" in ended.err, str(ended)


# -------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    "launcher, sizes, fault, peers",
    [
        ("spawn", (2, 2), "kill", "talking"),
        ("spawn", (3, 1), "kill", "quiet"),  # only the link can tell the others, which compute
        ("spawn", (2, 2), "raise", "quiet"),
        ("spawn", (3, 1), "exit", "stubborn"),
        ("plain", (2, 2), "raise", "talking"),
        ("torchrun", (2, 2), "kill", "quiet"),
        ("torchrun c10d", (2, 2), "raise", "talking"),
    ],
)
def test_a_failing_rank_is_named_on_every_node_and_ends_all(nodes, launcher, sizes, fault, peers):
    started = nodes(*sizes)
    all_ended, seconds = started.fail(launcher, fault, peers)
    print(launcher, fault, peers, f"{seconds:.2f} s")
    assert seconds < PROMISED_S, "\n".join(map(str, all_ended))
    for node, ended in enumerate(all_ended):
        assert ended.status not in (0, 2), str(ended)
        spoke(sizes[0] * sizes[1] - 1, f"node{sizes[0]}", CAUSES[fault], ended)
        shown = ended.err.count("\nValueError: no such luck")
        assert shown == (1 if fault == "raise" and node in (0, sizes[0] - 1) else 0), str(ended)


def test_a_failing_rank_0_is_named_on_the_other_node(nodes):
    all_ended, seconds = nodes(2, 1).fail("spawn", "kill", "quiet", who=0)
    assert seconds < PROMISED_S
    for ended in all_ended:
        assert ended.status == 1
        spoke(0, "node1", CAUSES["kill"], ended)


def test_a_rank_that_hangs_is_named_when_the_time_is_up(nodes):
    all_ended, seconds = nodes(2, 2).fail("spawn", "stop", "talking", "--timeout", 4)
    assert 3 < seconds < 4 + 2 * PROMISED_S, "\n".join(map(str, all_ended))
    for ended in all_ended:
        assert ended.status == 1, str(ended)
        assert re.search(r"Rank [0-2] on node[12] \(pid \d+\) lost another rank: RuntimeError: Timed out waiting", ended.err), str(
            ended
        )
        assert "; rank 3 on node2 has said nothing (hanging, stopped, or still computing); ending " in ended.err, str(ended)


def training(run):
    return run.until(lambda: "Epoch [3/" in run.out, "the third epoch")


@pytest.mark.parametrize("timeout, limit", [(None, CUT_S), (6, 6 + 2 * PROMISED_S)])
def test_a_cut_cable_is_noticed_on_both_sides(three, nodes, timeout, limit):
    started = nodes(2, 2).start("spawn", *LONG, *(("--timeout", timeout) if timeout else ()))
    training(started[0])
    three.cut("node2")
    try:
        all_ended, seconds = started.gone_since(time.monotonic())
    finally:
        three.heal("node2")
    print(f"cut, --timeout {timeout}: {seconds:.2f} s")
    assert seconds < limit, "\n".join(map(str, all_ended))
    for ended, other in zip(all_ended, ("Node 1 (node2, ranks 2, 3)", "Node 0 (node1, ranks 0, 1)"), strict=True):
        said = re.findall(
            r"^(.*) has not answered for (\d+) s \(the host is down, or the network between is cut\)", ended.err, re.M
        )
        assert [who for who, _ in said] == [other] and ended.status == 1, str(ended)


@pytest.mark.parametrize("node", (0, 1))
def test_ctrl_c_on_one_node_ends_all(nodes, node):
    started = nodes(2, 2).start("spawn", *LONG)
    training(started[0])
    started[node].interrupt()
    all_ended, seconds = started.gone_since(time.monotonic())
    assert seconds < PROMISED_S, "\n".join(map(str, all_ended))
    assert all_ended[node].status == 130 and all_ended[node].err == "", str(all_ended[node])
    other = all_ended[1 - node]
    assert other.status == 1 and re.search(rf"Rank \d on node{node + 1} \(pid \d+\) was interrupted; ending", other.err), str(other)


def test_ctrl_c_while_the_others_are_waited_for(nodes):
    started = nodes(3, 1).start("spawn", *LONG, order=[0, 1])
    started[1].until(lambda: "waits for rank 2" in started[1].err, "the line")
    started[1].interrupt()
    all_ended, seconds = started.gone_since(time.monotonic())
    assert seconds < PROMISED_S, "\n".join(map(str, all_ended))
    assert [ended.status for ended in all_ended] == [1, 130]
    assert "Rank 1 on node2" in all_ended[0].err and "was interrupted" in all_ended[0].err


def test_a_launcher_that_is_killed_takes_the_other_node_along(nodes):
    started = nodes(2, 2).start("spawn", *LONG)
    training(started[0])
    path = str(ROOT / "launchers/spawn.py")
    launcher = next(p for p in started[1].processes() if p.cmdline()[1:2] == [path])
    launcher.kill()
    all_ended, seconds = started.gone_since(time.monotonic())
    assert seconds < PROMISED_S, "\n".join(map(str, all_ended))
    assert "Watch on node2: the launcher that started this node's ranks is gone; ending the 2 ranks here." in all_ended[0].err


@pytest.mark.parametrize("launcher", ("torchrun", "elastic"))
def test_ranks_start_again_on_all_nodes(nodes, tmp_path, launcher):
    from test_restarts import MODEL as MORTAL

    (tmp_path / "mortal.py").write_text(MORTAL)
    started = nodes(2, 2)
    started.agent_flags = ("--max_restarts", 3)
    started.start(launcher, *QUICK, "--model", "mortal:Dies", "--result", tmp_path / "result.json", FAILURES=2)
    for ended in started.finish():
        assert ended.status == 0, str(ended)
        assert len(re.findall(r"Rank [01] on node1 \(pid \d+\) (?:was killed by SIGKILL|ended without a word)", ended.err)) == 2, (
            str(ended)
        )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["restart"] == 2 and result["world_size"] == 4


def test_no_run_of_two_agents_crashes_as_it_leaves(nodes):
    for number in range(3):
        for ended in nodes(2, 2).start("torchrun", *QUICK).finish():
            assert ended.status == 0 and "terminate called" not in ended.err, f"run {number}: {ended}"


# ------------------------------------------------------------------------------------------ a host dies: a cluster each


def test_a_host_that_dies_is_named_and_the_other_node_ends(tmp_path):
    with cluster(2) as hosts:
        started = Nodes(hosts, tmp_path).start("spawn", *LONG)
        training(started[0])
        hosts.kill("node2")
        all_ended, seconds = started.gone_since(time.monotonic())
    assert seconds < PROMISED_S, "\n".join(map(str, all_ended))
    assert all_ended[0].status == 1
    assert f"Node 1 (node2, ranks 2, 3) {GONE}; ending the 2 ranks here.\n" in all_ended[0].err, str(all_ended[0])


def test_elastic_goes_on_alone_after_a_host_has_died(tmp_path):
    with cluster(2) as hosts:
        started = Nodes(hosts, tmp_path)
        started.nodes = "1:2"
        started.start("elastic", *LONG, order=[0, 1])
        started[0].until(lambda: "4 ranks on 2 nodes" in started[0].out, "both nodes")
        training(started[0])
        hosts.kill("node2")
        at = time.monotonic()
        started[0].until(lambda: "2 ranks on 1 node," in started[0].out, "two ranks alone", 40)
        print(f"a host killed: alone after {time.monotonic() - at:.2f} s")
        assert f"Node 1 (node2, ranks 2, 3) {GONE}" in started[0].err
        started[0].interrupt()
        assert started[0].finish().status == 130
        started[1].process.wait(10)


@pytest.mark.parametrize("fault", ("kill", "raise"))
@pytest.mark.parametrize("mpi", ("mpi", "openmpi"))
def test_under_mpirun_it_is_said_once(tmp_path, mpi, fault):
    """All nodes' output comes together in one terminal."""
    (tmp_path / "broken.py").write_text(MODEL)
    python = BIN / "python" if mpi == "mpi" else ROOT / ".venv-openmpi/bin/python"
    with cluster(2, ssh=True) as hosts:
        where = {
            "mpi": ["-launcher", "ssh", "-hosts", "node1:2,node2:2"],
            "openmpi": [
                "--host",
                "node1:2,node2:2",
                "--map-by",
                "ppr:2:node:oversubscribe",
                *itertools.chain(*(("-x", n) for n in ("FAULT", "PEERS", "WHO", MARKER))),
            ],
        }[mpi]
        program = [python, ROOT / "launchers/mpi.py", "--job", "random", "--model", "broken:Fails", "--threads", 1]
        words = [python.parent / "mpirun", *where, "-np", 4, *program]
        run = Run(hosts.command("node1", list(map(str, words)), cwd=tmp_path), tmp_path, FAULT=fault, PEERS="quiet", WHO=3)
        run.until((tmp_path / "failed").exists, "the fault")
        at = float((tmp_path / "failed").read_text().split()[1])
        while run.processes() and time.monotonic() < at + 60:
            time.sleep(0.05)
        seconds = time.monotonic() - at
        ended = run.finish()
        assert ended.status != 0 and seconds < PROMISED_S + 1, str(ended)
        spoke(3, "node2", CAUSES[fault], ended)
        left = hosts.run(["sh", "-c", "ps ax -o args | grep -c [m]pi.py"])
        assert {ended.stdout.strip() for ended in left.values()} == {"0"}
