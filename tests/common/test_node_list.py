"""SLURM's short forms, and the rank that its variables describe."""

import re
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.command_line import parse_config
from common.errors import UsageError
from common.namespaces import program
from common.node_list import MOST, expand_nodes, expand_tasks
from common.ports import step_port
from launchers.slurm import rank_from_slurm

LISTS = {
    "lone": ["lone"],
    "a,b": ["a", "b"],
    "lab[1-3,07],gpu-a[01-02]x,lone": ["lab1", "lab2", "lab3", "lab07", "gpu-a01x", "gpu-a02x", "lone"],
    "n[08-11]": ["n08", "n09", "n10", "n11"],
    "n[8-11]": ["n8", "n9", "n10", "n11"],
    "n[007]": ["n007"],
    "r[1-2]n[01-02]": ["r1n01", "r1n02", "r2n01", "r2n02"],
    "r[1,3]n[1-2]-ib": ["r1n1-ib", "r1n2-ib", "r3n1-ib", "r3n2-ib"],
    "node2,node1": ["node2", "node1"],  # in its order, as far as the step's variables keep one
    "host.domain[1-2].org": ["host.domain1.org", "host.domain2.org"],
}


@pytest.mark.parametrize("text", LISTS)
def test_a_node_list_is_written_out(text):
    assert expand_nodes(text) == LISTS[text]


@pytest.mark.skipif(not program("scontrol"), reason="needs slurm-client")
@pytest.mark.parametrize("text", [text for text in LISTS if not re.search(r"\][a-z.-]+(,|$)", text)])
def test_as_slurm_does_it(text, tmp_path):
    """No daemon is asked: scontrol writes it out by itself, but wants a configuration. (22.05 knows no letters at the end.)"""
    (tmp_path / "slurm.conf").write_text("ClusterName=none\nSlurmctldHost=localhost\n")
    words = [program("scontrol"), "show", "hostnames", text]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=20, env={"SLURM_CONF": str(tmp_path / "slurm.conf")})
    assert ended.stdout.split() == expand_nodes(text), ended


@given(
    st.lists(st.tuples(st.from_regex(r"[a-z][a-z-]{0,5}", fullmatch=True), st.integers(0, 9999), st.integers(0, 30)), min_size=1)
)
def test_ranges_of_any_width(parts):
    text = ",".join(f"{name}[{first:04}-{first + more:04}]" for name, first, more in parts)
    assert expand_nodes(text) == [f"{name}{n:04}" for name, first, more in parts for n in range(first, first + more + 1)]


@pytest.mark.parametrize(
    "text",
    ["", " ", ",", "a,", ",a", "a,,b", "a b", "a[", "a]", "a[]", "a[1", "a[1-]", "a[-1]", "a[3-1]", "a[x]", "a[1-2-3]", "a[1,]",
     "a[[1]]", "a[1]]", "a[1 2]", "a[²]", "a\n"],
)  # fmt: skip
def test_nonsense_is_refused_in_one_line(text):
    with pytest.raises(UsageError, match=r"^SLURM_STEP_NODELIST=.*: start this with srun, which sets it$"):
        expand_nodes(text)


@pytest.mark.parametrize("text", ["n[1-999999999]", "n[1-300]x[1-300]", ",".join(["n[1-40000]"] * 2)])
def test_a_list_too_long_is_refused_before_it_is_written_out(text):
    with pytest.raises(UsageError, match=f"more than {MOST} nodes"):
        expand_nodes(text)


def test_tasks_per_node():
    assert expand_tasks("2(x3),1") == [2, 2, 2, 1]
    assert expand_tasks("2,1") == [2, 1] and expand_tasks("4") == [4] and expand_tasks("1(x2),3,2(x1)") == [1, 1, 3, 2]
    for text in ("", "x", "2,", "2(3)", "2(x)", "-1", "2 (x3)", "²"):
        with pytest.raises(UsageError, match=r"^SLURM_STEP_TASKS_PER_NODE=.*: no numbers of tasks; SLURM writes 2\(x3\),1"):
            expand_tasks(text)
    with pytest.raises(UsageError, match="more than"):
        expand_tasks("1(x99999999)")


# ------------------------------------------------------------------------------------------------- who a rank is


def variables(procid=0, node="node1", localid=0, tasks="2,1", nodes="node[1-2]", **more):
    """What srun sets for a task (the part that is read), in a step of three by default."""
    number = sum(expand_tasks(tasks))
    made = {"SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_PROCID": procid, "SLURM_LOCALID": localid, "SLURMD_NODENAME": node,
            "SLURM_STEP_NUM_TASKS": number, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_STEP_NODELIST": nodes}  # fmt: skip
    return {name: str(value) for name, value in (made | more).items()}


def rank(environment, *flags):
    return rank_from_slurm(environment, parse_config("slurm.py", extra=("master_addr", "master_port"), argv=flags, environment={}))


def test_uneven_tasks():
    first, second, third = rank(variables()), rank(variables(1, localid=1)), rank(variables(2, "node2"))
    assert [(r.rank, r.world_size, r.local_rank, r.local_world_size, r.node_rank) for r in (first, second, third)] == [
        (0, 3, 0, 2, 0), (1, 3, 1, 2, 0), (2, 3, 0, 1, 1)
    ]  # fmt: skip
    assert {(r.launcher, r.master_addr, r.master_port) for r in (first, second, third)} == {("slurm", "node1", step_port(7, 0))}
    assert [r.serves_store for r in (first, second, third)] == [True, False, False]


def test_rank_0_on_another_node_than_the_first():
    """--distribution=arbitrary, as recorded from srun -m arbitrary -w node2,node1,node1."""
    ranks = [rank(variables(0, "node2")), rank(variables(1, "node1")), rank(variables(2, "node1", 1))]
    assert [(r.node_rank, r.local_world_size, r.serves_store) for r in ranks] == [(1, 1, False), (0, 2, True), (0, 2, False)]
    assert {r.master_addr for r in ranks} == {"node1"}


def test_a_heterogeneous_step_whose_node_numbers_are_in_another_order_than_its_lists():
    """Recorded from srun -w node2 -n1 : -w node1 -n2."""
    recorded = [("node2", 0, 0), ("node1", 0, 1), ("node1", 1, 1)]
    ranks = [rank(variables(n, node, local, SLURM_NODEID=number)) for n, (node, local, number) in enumerate(recorded)]
    assert [(r.node_rank, r.local_rank, r.local_world_size) for r in ranks] == [(1, 0, 1), (0, 0, 2), (0, 1, 2)]
    assert [r.serves_store for r in ranks] == [False, True, False]


def test_the_master_can_be_named():
    on_2 = [rank(variables(*who), "--master_addr", "node2", "--master_port", "99") for who in ((0, "node1"), (2, "node2"))]
    assert {(r.master_addr, r.master_port) for r in on_2} == {("node2", 99)}
    assert [r.serves_store for r in on_2] == [False, True]
    other_name = rank(variables(), "--master_addr", "10.0.0.1")  # the first node's other address
    assert other_name.serves_store and other_name.master_addr == "10.0.0.1"
    one_node = rank(variables(tasks="3", nodes="node7", node="node7"))
    assert one_node.one_node and one_node.master_addr == "127.0.0.1"


def test_a_loopback_master_is_for_one_node():
    with pytest.raises(
        UsageError, match=r"^--master_addr 127.0.0.1 \(or MASTER_ADDR\) with 2 nodes: to each node that is the node"
    ):
        rank(variables(), "--master_addr", "127.0.0.1")
    assert rank(variables(tasks="3", nodes="node1"), "--master_addr", "127.0.0.1").one_node


@pytest.mark.parametrize(
    "more, cpus",
    [
        ({}, 1),
        ({"SLURM_CPUS_ON_NODE": 8}, 4),
        ({"SLURM_CPUS_ON_NODE": 1}, 1),  # --overcommit
        ({"SLURM_CPUS_ON_NODE": 8, "SLURM_CPUS_PER_TASK": 3}, 3),
    ],
)
def test_cpus_that_were_granted(more, cpus):
    assert rank(variables(**more)).cpus == cpus


def test_ports_of_neighbouring_jobs_differ():
    ports = {step_port(job, step) for job in range(4_000_000, 4_000_190) for step in range(100)}
    assert len(ports) == 19_000 and min(ports) >= 10000 and max(ports) < 32768


def without(name):
    return {key: value for key, value in variables().items() if key != name}


@pytest.mark.parametrize(
    "environment, said",
    [
        ({}, "SLURM_JOB_ID is not set: srun sets it; type srun -N2 -n4 python launchers/slurm.py"),
        ({"SLURM_JOB_ID": "7"}, "not started by srun, though within job 7: type srun python launchers/slurm.py"),  # salloc
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "not started by srun, though within job 7"),  # sbatch
        (variables(SLURM_STEP_ID=0xFFFFFFFA), "not started by srun, though within job 7"),  # salloc with use_interactive_step
        (without("SLURMD_NODENAME"), "not started by srun, though within job 7"),
        (without("SLURM_STEP_NODELIST"), "SLURM_STEP_NODELIST='': no list of nodes"),
        (variables(node="node9"), "3 tasks, 2,1 of them on node[1-2], and this on node9: SLURM's variables do not"),
        (variables(SLURM_STEP_NUM_TASKS=4), "4 tasks, 2,1 of them on node[1-2]"),
        (variables(SLURM_STEP_TASKS_PER_NODE="3"), "3 tasks, 3 of them on node[1-2]"),
        (variables(SLURM_PROCID="x"), "SLURM_PROCID=x: not allowed"),
        (variables(SLURM_LOCALID=2), "LOCAL_RANK 2 with LOCAL_WORLD_SIZE 2"),
    ],
)  # fmt: skip
def test_what_no_srun_has_set_is_refused(environment, said):
    with pytest.raises(UsageError) as refused:
        rank(environment)
    assert str(refused.value).startswith(said)
