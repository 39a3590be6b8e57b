"""Launchers within launchers, for real: one sentence, once, and nobody waits; what people do on purpose still works."""

import json
import re

import pytest
from running import ROOT, command, run, tracebacks_of_ours

pytestmark = [pytest.mark.launch, pytest.mark.only_on("linux")]

SHORT = ("--job", "random", "--data_size", "128", "--epochs", "1")
LEFT_OVER = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29400}
WITHIN = {
    "mpirun of plain": ("mpi", "plain", (), r"plain.py under mpirun, which started 2 processes: each would train alone"),
    "mpirun of spawn": (
        "mpi",
        "spawn",
        ("--world_size", "2"),
        r"spawn.py under mpirun, which started 2 processes: each would start",
    ),
    "Open MPI's of spawn": ("openmpi", "spawn", (), r"spawn.py under mpirun, which started 2 processes: each would start ranks"),
    "mpirun of elastic": ("mpi", "elastic", (), r"elastic.py under mpirun, which started 2 processes: each would start ranks of"),
    "mpirun of torchrun.py": ("mpi", "torchrun", (), r"torchrun.py under mpirun, which started 2 processes and sets no RANK: type"),
    "torchrun of plain": ("torchrun", "plain", ("--world_size", "2"), r"plain.py under torchrun, which started 2 processes: each"),
    "torchrun of spawn": (
        "torchrun",
        "spawn",
        (),
        r"spawn.py under torchrun, which started 2 processes: each would start ranks of",
    ),
    "torchrun of mpi": (
        "torchrun",
        "mpi",
        (),
        r"mpi.py under torchrun, which started 2 processes: each is a world of its own to MPI",
    ),
}


def refused(ended, line, status=2):
    assert ended.status == status, str(ended)
    errors = re.findall(r"^error: .*$", ended.err, re.MULTILINE)
    assert len(errors) == 1 and re.match(f"error: {line}", errors[0]), str(ended)
    assert tracebacks_of_ours(ended) == 0 and "Process initialized" not in ended.out, str(ended)


def within(outer, inner, *flags):
    """``outer``'s command with the file of ``inner`` as what it starts."""
    words = command(outer, 2)[:-1]
    if outer == "openmpi":
        words[-1] = "python"  # of the environment where torch is; its MPI is not asked
    return [*words, str(ROOT / "launchers" / f"{inner}.py"), *flags, *SHORT]


@pytest.mark.parametrize("case", WITHIN)
def test_a_launcher_within_another(tmp_path, case):
    outer, inner, flags, line = WITHIN[case]
    refused(run(within(outer, inner, *flags), cwd=tmp_path), line, status=1 if outer == "torchrun" else 2)


@pytest.mark.parametrize(
    "outer, line", (("mpi", "torchrun under mpirun, which started 2"), ("torchrun", "torchrun under torchrun: the"))
)
def test_torchruns_within_another_launcher(tmp_path, outer, line):
    """Each has a world of its own and would train well, all on the same cores."""
    inner = ["torchrun", "--nproc_per_node=2", str(ROOT / "launchers/torchrun.py"), *SHORT]
    words = ["mpirun", "-np", "2"] if outer == "mpi" else ["torchrun", "--nproc_per_node=2", "--no-python"]
    refused(run([*words, *inner], cwd=tmp_path), line, status=1)


def test_variables_left_over_before_mpirun(tmp_path):
    """MPICH hands them to all its processes, and each takes itself for rank 0."""
    line = "RANK=0 WORLD_SIZE=2 in the environment under mpirun, which started 2 processes: all are told the same; unset RANK"
    refused(run(within("mpi", "torchrun"), cwd=tmp_path, **LEFT_OVER), line)


def test_variables_left_over_before_spawn(tmp_path):
    line = r"RANK=0 WORLD_SIZE=2 in the environment: spawn.py numbers its ranks itself; unset RANK WORLD_SIZE, or use plain.py"
    refused(run(command("spawn", 2, *SHORT), cwd=tmp_path, **LEFT_OVER), line)


@pytest.mark.parametrize("mpi, other", (("mpi", "openmpi"), ("openmpi", "mpi"), ("mpi", "systemmpi")))
def test_an_mpirun_of_another_mpi(tmp_path, mpi, other):
    """The first two are of wheels; the third Python uses the system's MPI. (Two hosts: test_mpi_hosts.py.)"""
    python = command(other, 2)[3]
    ended = run([*command(mpi, 2)[:3], python, str(ROOT / "launchers/mpi.py"), *SHORT], cwd=tmp_path)
    whose, uses = ("Open MPI", "MPICH") if mpi == "openmpi" else ("MPICH", "Open MPI")
    refused(
        ended, rf"{whose}'s mpirun started 2 processes, but mpi4py uses {uses}, to which each would be a world of its own; type /"
    )
    said = re.findall(r"type (\S+) -np 2 ", ended.err)
    belongs = run([*said, "-np", "2", python, str(ROOT / "launchers/mpi.py"), *SHORT], cwd=tmp_path)
    assert belongs.status == 0 and "mpi: 2 ranks on 1 node" in belongs.out, str(belongs)


# -------------------------------------------------------------------------------------------------------- on purpose


@pytest.mark.parametrize("launcher", ("torchrun", "mpi", "elastic"))
def test_variables_left_over_where_the_launcher_sets_its_own(tmp_path, launcher):
    ended = run(command(launcher, 2, *SHORT), cwd=tmp_path, **(LEFT_OVER | {"MASTER_PORT": 0 if launcher != "torchrun" else 29400}))
    assert ended.status == 0 and ": 2 ranks on 1 node" in ended.out, str(ended)


def test_a_shell_that_numbers_mpiruns_processes(tmp_path, free_port):
    numbers = f"RANK=$PMI_RANK LOCAL_RANK=$PMI_RANK WORLD_SIZE=$PMI_SIZE MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port}"
    for file in ("torchrun", "plain"):
        line = f"{numbers} python {ROOT}/launchers/{file}.py {' '.join(SHORT)}; exit $?"
        ended = run(["mpirun", "-np", "2", "sh", "-c", line], cwd=tmp_path)
        assert ended.status == 0 and f"{file}: 2 ranks on 1 node" in ended.out, str(ended)


def test_a_program_under_mpirun_that_starts_runs_of_its_own(tmp_path):
    """As pytest or a notebook server does there; and one process alone under mpirun."""
    (tmp_path / "program.py").write_text("import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))")
    ended = run(["mpirun", "-np", "2", "python", "program.py", *command("spawn", 2, *SHORT)], cwd=tmp_path)
    assert ended.status == 0 and ended.out.count("2 ranks on 1 node") == 2, str(ended)
    ended = run(["mpirun", "-np", "1", *command("spawn", 2, *SHORT)], cwd=tmp_path)
    assert ended.status == 0 and "2 ranks on 1 node" in ended.out, str(ended)


def test_torch_distributed_launch_with_its_flag(tmp_path):
    """The old launcher hands --local-rank to each rank."""
    words = ["python", "-m", "torch.distributed.launch", "--nproc_per_node=2", str(ROOT / "launchers/torchrun.py"), *SHORT]
    ended = run([*words, "--result", "result.json"], cwd=tmp_path)
    assert ended.status == 0, str(ended)
    assert json.loads((tmp_path / "result.json").read_text())["world_size"] == 2
