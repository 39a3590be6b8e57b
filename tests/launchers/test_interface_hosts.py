"""The interface by the route: hosts whose names lead elsewhere train, where a bare script over gloo hangs."""

import json
import re

import pytest
from running import HERE, ROOT, Run, run, trained
from test_parity import difference

from common.virtual_cluster import VirtualCluster, missing

pytestmark = [pytest.mark.launch, pytest.mark.only_on("linux")]

JOB = ("--job", "random", "--data_size", 127, "--global_batch_size", 17, "--epochs", 2, "--precision", "fp64", "--timeout", 60)
BARE = """
import datetime
import torch
import torch.distributed as dist

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))
ones = torch.ones(1)
dist.all_reduce(ones)
print("the sum is", int(ones))
"""
LAUNCHERS = str(ROOT / "launchers")
NNODES = ("--nnodes", 2, "--node_rank", "{rank}", "--nproc_per_node", 2, "--master_addr", "{master}", "--master_port", 29500)
WAYS = {
    "plain": ["python", f"{LAUNCHERS}/plain.py", *NNODES],
    "spawn": ["python", f"{LAUNCHERS}/spawn.py", *NNODES],
    "elastic": ["python", f"{LAUNCHERS}/elastic.py", "--nnodes", 2, "--nproc_per_node", 2, "--master_addr", "{master}"],
    "elastic by address": ["python", f"{LAUNCHERS}/elastic.py", "--nnodes", 2, "--nproc_per_node", 2, "--master_addr", "10.97.0.1"],
    "torchrun": ["torchrun", "--nnodes=2", "--node_rank={rank}", "--nproc_per_node=2", "--master_addr={master}",
                 f"{LAUNCHERS}/torchrun.py"],
    "torchrun (c10d)": ["torchrun", "--nnodes=2", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint={master}:29400",
                        f"{LAUNCHERS}/torchrun.py"],
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    if why := missing():
        pytest.skip(why)
    with VirtualCluster(nodes=2) as hosts:
        for name in hosts.names:
            (hosts.folder / f"{name}.hosts.kept").write_text((hosts.folder / f"{name}.hosts").read_text())
        yield hosts


@pytest.fixture
def named(cluster):
    """Writes the hosts' files of names: of each host {name: address}; the tests' changes are undone."""

    def write(of_host):
        for name in cluster.names:
            rows = [f"{address} {known}" for known, address in ({"localhost": "127.0.0.1"} | of_host(name)).items()]
            (cluster.folder / f"{name}.hosts").write_text("\n".join(rows) + "\n")

    yield write
    for name in cluster.names:
        (cluster.folder / f"{name}.hosts").write_text((cluster.folder / f"{name}.hosts.kept").read_text())


def as_debian_does(cluster):
    """Each host's own name is 127.0.1.1 in its own file."""
    return lambda host: cluster.addresses | {host: "127.0.1.1"}


def on_all(cluster, words, cwd, **env):
    """Runs it on each host at the same time."""
    runs = [
        Run(cluster.command(name, cluster.filled_in(name, [str(word) for word in words]), cwd=cwd), cwd=cwd, **env)
        for name in cluster.names
    ]
    return [each.finish() for each in runs]


def check_training(tmp_path, ended, chosen):
    """Both ended well, said what they chose, and computed what one process computes."""
    assert [each.status for each in ended] == [0, 0], f"{ended[0]}\n{ended[1]}"
    for each, line in zip(ended, chosen, strict=True):
        assert re.findall(r"^node\d: gloo over .*$", each.out, re.M) == [line], str(each)
    many = json.loads((tmp_path / "result.json").read_text())
    alone = trained(["python", f"{LAUNCHERS}/plain.py", *map(str, JOB)], tmp_path / "alone.json")
    assert sorted(many["hosts"]) == ["node1", "node1", "node2", "node2"]
    for curve in ("loss_per_step", "train_loss_per_epoch"):
        assert difference(many[curve], alone[curve]) < 1e-9, curve


def test_a_bare_script_hangs_where_own_names_are_loopback_addresses(cluster, named, tmp_path):
    """Gloo offers the others the address of the host's own name: each connects to itself."""
    (tmp_path / "bare.py").write_text(BARE)
    words = ["torchrun", "--nnodes=2", "--node_rank={rank}", "--master_addr={master}", "--nproc_per_node=1", "bare.py"]
    named(as_debian_does(cluster))
    ended = on_all(cluster, words, tmp_path)
    for each in ended:
        assert each.status == 1 and "the sum is" not in each.out, str(each)
    assert re.search(r"127\.0\.1\.1|[Tt]imed? ?out", ended[0].err + ended[1].err), str(ended[0])


@pytest.mark.parametrize("way", [way for way in WAYS if way != "plain"])
def test_own_names_that_are_loopback_addresses(cluster, named, tmp_path, way):
    named(as_debian_does(cluster))
    ended = on_all(cluster, [*WAYS[way], *JOB, "--result", "result.json"], tmp_path)
    first, second = (f"node{k}: gloo over eth0 (10.97.0.{k}): the route to " for k in (1, 2))
    if way.startswith("elastic"):  # whose agent tells the others its address, not its name
        first, second = first + "10.97.0.1", second + "10.97.0.1"
    else:
        first += "10.97.0.2 of another node; node1 is the loopback interface here"
        second += "node1"
    if "node2" in re.findall(r"\[Rank 0\] Process initialized on (\S+),", ended[0].out + ended[1].out):
        assert way.startswith("elastic") or way == "torchrun (c10d)"  # agents number themselves as they come
        swap = str.maketrans({"1": "2", "2": "1"})
        first, second = (re.sub(r"node\d|(?<=0\.)\d", lambda m: m[0].translate(swap), line) for line in (second, first))
    check_training(tmp_path, ended, (first, second))


def test_names_of_ipv6_addresses_only(cluster, named, tmp_path):
    """And no IPv4 address on the network at all."""
    named(lambda host: {known: f"fd97::{k}" for k, known in enumerate(cluster.names, 1)})
    cluster.run(["ip", "address", "del", "{addr}/24", "dev", "eth0"])
    try:
        ended = on_all(cluster, [*WAYS["spawn"], *JOB, "--result", "result.json"], tmp_path)
    finally:
        cluster.run(["ip", "address", "add", "{addr}/24", "dev", "eth0"])
    said = [f"node{k}: gloo over eth0 (fd97::{k}): the route to node1" for k in (1, 2)]
    check_training(tmp_path, ended, said)


def test_two_networks_of_which_one_reaches_the_master(cluster, named, tmp_path):
    """The hosts' own names are addresses of the other network, where each host is alone."""
    for name in cluster.names:
        for words in ("link add lab0 type bridge", "address add 10.99.0.1/24 dev lab0", "link set lab0 up"):
            assert cluster.run(["ip", *words.split()], on=name)[name].returncode == 0
    try:
        named(lambda host: cluster.addresses | {host: "10.99.0.1"} | {"master": cluster.addresses["node1"]})
        words = [word if word != "{master}" else "master" for word in WAYS["spawn"]]
        ended = on_all(cluster, [*words, *JOB, "--result", "result.json"], tmp_path)
    finally:
        cluster.run(["ip", "link", "del", "lab0"])
    said = [f"node{k}: gloo over eth0 (10.97.0.{k}): the route to master" for k in (1, 2)]
    check_training(tmp_path, ended, said)


def test_what_the_user_says_stands(cluster, tmp_path):
    ended = on_all(cluster, [*WAYS["spawn"], *JOB, "--result", "result.json"], tmp_path, GLOO_SOCKET_IFNAME="eth0")
    check_training(tmp_path, ended, [f"node{k}: gloo over eth0, as GLOO_SOCKET_IFNAME says" for k in (1, 2)])


def test_the_same_node_twice(cluster, tmp_path):
    """--node_rank 0 on both: all hear of it at once, and nobody waits for node 1 until the time is up."""
    twice = on_all(cluster, [word if word != "{rank}" else "0" for word in WAYS["plain"]] + list(JOB[:-1]) + [600], tmp_path)
    for each in twice:
        assert each.status == 2, str(each)
        assert each.seconds < 60, str(each)
        print(each)
    said = [re.findall(r"^error: (.*)$", each.err, re.M) for each in twice]
    assert any(
        re.match(r"rank \d is there twice, on node\d \(pid \d+\) and on node\d \(pid \d+\)", line) for of in said for line in of
    )


@pytest.mark.parametrize("launcher", ("plain", "spawn", "elastic"))
def test_a_loopback_master_with_several_nodes_is_refused_at_once(launcher):
    more = ("--nproc_per_node", 1) if launcher == "elastic" else ("--node_rank", 1, "--nproc_per_node", 1)
    words = ["python", ROOT / "launchers" / f"{launcher}.py", "--nnodes", 2, "--master_addr", "localhost", *more]
    ended = run([str(word) for word in words], MASTER_PORT=29500)
    assert (ended.status, ended.out) == (2, ""), str(ended)
    assert ended.err == (
        "error: --master_addr localhost (or MASTER_ADDR) with --nnodes 2: to each node that is the node itself; give the name or "
        f"address by which the others reach node 0 (this machine is {HERE})\n"
    )


def test_a_worker_whose_master_is_its_own_loopback_name(cluster, named, tmp_path):
    """The name of node 0, wrongly written in the other host's file."""
    named(lambda host: cluster.addresses | ({"node1": "127.0.1.1"} if host == "node2" else {}))
    words = cluster.filled_in("node2", [str(word) for word in (*WAYS["spawn"], *JOB)])
    ended = Run(cluster.command("node2", words, cwd=tmp_path), cwd=tmp_path).finish()
    assert ended.status == 2 and "Epoch" not in ended.out, str(ended)
    assert ended.err.startswith("error: --master_addr node1 (or MASTER_ADDR) with --nnodes 2: to each node that is the node itself")


def test_a_master_that_is_another_machine_with_one_node(tmp_path):
    """MASTER_ADDR, left over from a run over several nodes."""
    for launcher in ("plain", "spawn"):
        words = ["python", str(ROOT / "launchers" / f"{launcher}.py"), "--world_size", "2"]
        ended = run(words, cwd=tmp_path, MASTER_ADDR="192.0.2.201")
        assert (ended.status, ended.out) == (2, ""), str(ended)
        said = "error: --master_addr 192.0.2.201 (or MASTER_ADDR) with one node: it is not this machine; leave it out, or give "
        assert ended.err == said + "--nnodes\n"
