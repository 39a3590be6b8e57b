"""Launchers that srun's tasks start for themselves, by the variables that real ones had (recorded from SLURM 22.05, torch 2.13)."""

import pytest

from common.nesting_srun import under_srun

UUID = "1b2b1fa2-221a-4bbb-8d92-ab9e5e548b60"


def step(tasks, procid=0, **more):
    number = sum(int(part[0]) * int(part[3] if "x" in part else 1) for part in tasks.split(","))
    made = {"SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_PROCID": procid, "SLURM_STEP_NUM_TASKS": number,
            "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_STEP_NODELIST": "node[1-2]", "SLURMD_NODENAME": "node1"}  # fmt: skip
    return {name: str(value) for name, value in (made | more).items()}


def agent(nodes, run=UUID, local_rank=0, master="node1"):
    return {
        "TORCHELASTIC_RUN_ID": run,
        "GROUP_WORLD_SIZE": nodes,
        "LOCAL_RANK": local_rank,
        "RANK": local_rank,
        "MASTER_ADDR": master,
    }


@pytest.mark.parametrize(
    "launcher, environment, keywords, said",
    [
        ("torchrun", step("3,1", **agent(1)), {}, "srun started torchrun 4 times, several of them on one node, and each"),
        ("torchrun", step("2(x2)", **agent(4, "7")), {}, "srun started torchrun 4 times, several of them on one node"),
        ("torchrun", step("1(x2)", **agent(1)), {}, "srun started torchrun on 2 nodes, and each was told of one node only"),
        ("torchrun", step("1(x2)", **agent(1, "none", master="127.0.0.1")), {}, "srun started torchrun on 2 nodes"),
        ("spawn", step("3,1"), {}, "srun started spawn.py 4 times, several of them on one node"),
        ("spawn", step("1(x2)"), {"nodes": 1}, "srun started spawn.py on 2 nodes, and each was told of one node only"),
        ("elastic", step("2"), {"nodes": 1}, "srun started elastic.py 2 times, several of them on one node"),
        ("plain", step("2"), {}, "srun started plain.py 2 times, several of them on one node, and each would train alone"),
        ("mpi", step("2(x2)"), {"alone": True}, "srun started 4 tasks, and each is a world of its own to this MPI"),
        ("mpi", step("2", OMPI_COMM_WORLD_RANK=0), {}, "srun started 2 tasks, several of them on one node, and each an mpirun"),
        ("slurm", step("1(x2)", **agent(1)), {}, "slurm.py under torchrun, which srun started"),
        ("slurm", step("2", MPI_LOCALRANKID=0), {}, "slurm.py under mpirun, which srun started"),
    ],
)  # fmt: skip
def test_noticed(launcher, environment, keywords, said):
    sentence, speaks = under_srun(launcher, environment, **keywords)
    assert sentence.startswith(said) and len(sentence.splitlines()) == 1 and speaks == 0
    assert ("env -u SLURM_STEP_ID" in sentence) == (launcher != "slurm")
    if launcher != "slurm":  # the way out that the sentence names
        assert under_srun(launcher, {n: v for n, v in environment.items() if n != "SLURM_STEP_ID"}, **keywords) == ("", 0)


@pytest.mark.parametrize(
    "launcher, environment, keywords",
    [
        ("slurm", step("2(x2)"), {}),
        ("torchrun", step("1(x2)", **agent(2, "7")), {}),
        ("torchrun", step("1(x2)", **agent(1, "7")), {}),  # elastic: the other node may come yet
        ("torchrun", step("1", **agent(1)), {}),
        ("torchrun", step("2(x2)", RANK=1, WORLD_SIZE=4), {}),  # numbered by hand: srun bash -c 'RANK=$SLURM_PROCID … '
        ("plain", step("2(x2)", RANK=1, WORLD_SIZE=4), {}),
        ("spawn", step("1(x2)"), {"nodes": 2}),
        ("plain", step("1"), {}),  # srun --pty bash
        ("mpi", step("2(x2)"), {}),  # srun --mpi=pmi2
        ("mpi", step("1(x2)", MPI_LOCALRANKID=0), {}),  # mpirun in an allocation: srun starts its helpers, one a node
        ("spawn", {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "2(x2)"}, {}),  # salloc's shell
        ("spawn", step("2", SLURM_STEP_ID=0xFFFFFFFA), {}),  # salloc's, with use_interactive_step
        ("spawn", {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "many"}, {}),
        ("spawn", {}, {}),
    ],
)  # fmt: skip
def test_left_in_peace(launcher, environment, keywords):
    assert under_srun(launcher, environment, **keywords)[0] == ""


def test_one_process_speaks():
    assert under_srun("spawn", step("2(x2)", 3))[1] == 3
    assert under_srun("torchrun", step("2(x2)", 0, **agent(1, local_rank=1)))[1] == 1
