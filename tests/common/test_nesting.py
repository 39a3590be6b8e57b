"""One launcher within another: what is refused, what is not, and which processes count as launchers above this one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import nesting
from common.command_line import parse_config
from common.errors import UsageError
from common.nesting import Above, check_mpirun, check_nesting, foreign_mpirun, mpirun_of, under_mpirun, under_torchrun

ROOT = Path(__file__).resolve().parents[2]
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_RANK": "1"}
AGENT = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "GROUP_WORLD_SIZE": "1"}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}
MPIRUN = [Above("hydra_pmi_proxy"), Above("mpirun")]
TORCHRUN = [Above("torchrun")]


@pytest.mark.parametrize("launcher", ("plain", "spawn", "elastic", "mpi"))
@pytest.mark.parametrize("above", (TORCHRUN, None))
def test_a_launcher_as_torchruns_rank(launcher, above):
    said, rank = under_torchrun(launcher, AGENT, above)
    assert said.startswith(f"{launcher}.py under torchrun, which started 2 processes: each ") and rank == 1
    assert "type torchrun --nproc_per_node=N launchers/torchrun.py, or " in said


@pytest.mark.parametrize(
    "launcher, environment, above",
    [
        ("torchrun", AGENT, TORCHRUN),
        ("torchrun", AGENT, None),
        ("torchrun", BY_HAND, []),
        ("plain", BY_HAND, []),
        ("plain", AGENT, []),  # a test or notebook within a rank, which starts a run
        ("spawn", AGENT, [Above("plain.py"), Above("torchrun")]),
        ("torchrun", AGENT, [Above("torchrun"), Above("mpirun")]),
        ("torchrun", AGENT, [Above("torchrun"), Above("torchrun", {"WORLD_SIZE": "2"})]),  # a torchrun that is a script
        # One torchrun a node, started by another one.
        ("torchrun", AGENT | {"GROUP_WORLD_SIZE": "2"}, [Above("torchrun", AGENT), Above("torchrun")]),
        ("torchrun", AGENT, [Above("torchrun", AGENT | {"WORLD_SIZE": "1"}), Above("torchrun")]),
    ],
)
def test_what_is_well_with_torchrun(launcher, environment, above):
    assert under_torchrun(launcher, environment, above)[0] == ""


def test_torchrun_within_torchrun():
    said, rank = under_torchrun("torchrun", AGENT, [Above("torchrun", AGENT | {"RANK": "0"}), Above("torchrun")])
    assert said.startswith(
        "torchrun under torchrun: the outer one started 2 processes, and each is a torchrun with a world of its own"
    )
    assert rank == 1, "local rank 1 of the first"


@pytest.mark.parametrize("variables", (MPICH, OPEN_MPI))
@pytest.mark.parametrize("above", (MPIRUN, [Above("prted")], None))
@pytest.mark.parametrize("launcher", ("plain", "spawn", "elastic"))
def test_a_launcher_as_mpiruns_process(launcher, above, variables):
    said, rank = under_mpirun(launcher, variables, above, nodes=1)
    assert said.startswith(f"{launcher}.py under mpirun, which started 4 processes: each would ") and rank == 1
    assert f"type mpirun -np N python launchers/mpi.py, or python launchers/{launcher}.py" in said
    assert under_mpirun(launcher, variables, above, nodes=2)[0] == said, "two on this node, and told of two nodes"


@pytest.mark.parametrize("variables", (MPICH, OPEN_MPI))
def test_torchruns_as_mpiruns_processes(variables):
    said, rank = under_mpirun("torchrun", AGENT | variables, [*TORCHRUN, *MPIRUN], nodes=1)
    assert said.startswith("torchrun under mpirun, which started 4 processes: each would start ranks of its own") and rank == 2
    no_numbers, rank = under_mpirun("torchrun", variables, MPIRUN, nodes=1)
    assert no_numbers.startswith("torchrun.py under mpirun, which started 4 processes and sets no RANK: type mpirun") and rank == 1


@pytest.mark.parametrize("launcher", ("plain", "torchrun"))
def test_variables_left_over_before_mpirun(launcher):
    above = [Above("hydra_pmi_proxy", BY_HAND), Above("mpirun", BY_HAND)]
    said, rank = under_mpirun(launcher, BY_HAND | MPICH, above, nodes=1)
    assert said.startswith("RANK=1 WORLD_SIZE=4 in the environment under mpirun, which started 4 processes: all are told the same")
    assert rank == 1


ONE_A_NODE = {"MPI_LOCALNRANKS": "1"}


@pytest.mark.parametrize(
    "launcher, environment, above, nodes",
    [
        ("mpi", MPICH, MPIRUN, 1),
        ("spawn", {}, MPIRUN, 1),
        ("spawn", MPICH, [], 1),  # a test or notebook within an mpirun
        ("spawn", MPICH | {"PMI_SIZE": "1"}, MPIRUN, 1),
        ("spawn", MPICH | ONE_A_NODE, MPIRUN, 4),  # an mpirun that starts one launcher a node
        ("elastic", MPICH | ONE_A_NODE, MPIRUN, 4),
        ("torchrun", AGENT | MPICH | ONE_A_NODE | {"GROUP_WORLD_SIZE": "4"}, [*TORCHRUN, *MPIRUN], 1),
        ("torchrun", AGENT | MPICH, TORCHRUN, 1),
        ("torchrun", BY_HAND | MPICH, MPIRUN, 1),  # a shell between has numbered them
        ("plain", BY_HAND | MPICH, MPIRUN, 1),
        ("plain", MPICH | {"PMI_SIZE": "many"}, MPIRUN, 1),
        ("spawn", MPICH, [Above("slurmstepd")], 1),  # srun's --mpi=pmi2 sets them too
    ],
)
def test_what_is_well_with_mpirun(launcher, environment, above, nodes):
    assert under_mpirun(launcher, environment, above, nodes)[0] == ""


@pytest.mark.parametrize(
    "vendor, size, environment, whose",
    [
        ("MPICH", None, OPEN_MPI, "Open MPI's mpirun started 4 processes, but mpi4py uses MPICH, to which each"),
        ("Open MPI", None, MPICH, "MPICH's mpirun started 4 processes, but mpi4py uses Open MPI, to which each"),
        ("Open MPI", 1, MPICH, "MPICH's mpirun started 4 processes, but mpi4py uses Open MPI, to which each"),
        ("Open MPI", 1, OPEN_MPI, "an mpirun started 4 processes, but mpi4py uses Open MPI of another build, to which each"),
    ],
)
def test_an_mpirun_of_another_mpi(vendor, size, environment, whose):
    for above in (MPIRUN, None):
        said, rank = foreign_mpirun(vendor, size, environment, above)
        assert said.startswith(whose) and rank == 1
        assert said.endswith(f"type {mpirun_of(vendor)} -np 4 {sys.executable} launchers/mpi.py")


@pytest.mark.parametrize(
    "vendor, size, environment, above",
    [
        ("MPICH", None, MPICH, MPIRUN),
        ("MPICH", 4, MPICH, MPIRUN),
        ("Open MPI", None, OPEN_MPI, MPIRUN),
        ("Open MPI", 4, OPEN_MPI, MPIRUN),
        ("MPICH", 1, MPICH, []),  # python launchers/mpi.py, from a test within an mpirun
        ("MPICH", 1, {}, []),
        ("Open MPI", 1, OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, MPIRUN),
        ("Open MPI", None, MPICH | {"PMIX_RANK": "1"}, MPIRUN),  # it speaks both languages
    ],
)
def test_the_right_mpirun(vendor, size, environment, above):
    assert foreign_mpirun(vendor, size, environment, above)[0] == ""


def test_the_mpirun_that_belongs():
    beside = Path(sys.executable).parent / "mpirun"
    assert mpirun_of("MPICH") == str(beside) or not beside.exists()
    assert mpirun_of("No such MPI").endswith(("mpirun", "mpirun.mpich", "the mpirun of that No such MPI"))


# ------------------------------------------------------------------------------------------------- who is above


SHOW = "from common.nesting import launchers_above as f; print([(a.program, a.environment.get('SEEN')) for a in f()])"


def above(words, folder, **env):
    done = subprocess.run(
        words, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)} | env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done
    return done.stdout.strip()


@pytest.mark.only_on("linux")
def test_launchers_count_through_shells_and_no_further(tmp_path):
    """Real processes: a launcher's program is known by its name."""
    launcher = tmp_path / "launchers" / "outer.py"
    launcher.parent.mkdir()
    launcher.write_text("import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))")
    python, outer = sys.executable, [sys.executable, str(launcher)]
    show = [python, "-c", SHOW]
    shell = ["sh", "-c", '"$@"; exit $?', "sh"]  # a shell that stays
    assert above(show, tmp_path) == "[]", "pytest is no launcher"
    assert above([*outer, *show], tmp_path, SEEN="yes") == "[('outer.py', 'yes')]"
    assert above([*outer, *shell, "timeout", "60", *show], tmp_path) == "[('outer.py', None)]"
    assert above([*outer, *shell, *outer, "env", "SEEN=no", *show], tmp_path) == "[('outer.py', None), ('outer.py', None)]"
    other = [python, "-c", "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"]
    assert above([*outer, *other, *show], tmp_path) == "[]", "a program between starts what it likes"


def test_where_the_system_does_not_tell_the_variables_do(monkeypatch):
    monkeypatch.setattr(nesting.Path, "exists", lambda path: False)
    assert nesting.launchers_above() is None


@pytest.mark.parametrize("rank, raised", (("0", UsageError), ("1", SystemExit)))
def test_one_of_them_speaks_and_the_others_leave_later(monkeypatch, rank, raised):
    monkeypatch.setattr(nesting, "launchers_above", lambda: MPIRUN)
    monkeypatch.setattr(nesting, "_QUIET_S", 0.1)
    began = time.monotonic()
    for check in (lambda env: check_nesting("spawn", env), lambda env: check_mpirun("Open MPI", None, env)):
        with pytest.raises(raised) as left:
            check(MPICH | {"PMI_RANK": rank})
        assert str(left.value) == "2" or "started 4 processes" in str(left.value)
    assert (time.monotonic() - began > 0.2) == (raised is SystemExit)


@pytest.mark.parametrize("given", (["--local-rank=1"], ["--local_rank", "1"], ["--local-rank", "1", "--epochs", "2"]))
def test_the_flag_of_old_launchers(given):
    assert parse_config("torchrun.py", "", (), [*given, "--seed", "5"], {"LOCAL_RANK": "1"}).seed == 5
    with pytest.raises(
        UsageError, match=r"^--local_rank 1 with LOCAL_RANK=\(not set\): the variable decides; type torchrun --nproc"
    ):
        parse_config("torchrun.py", "", (), given, {})
    with pytest.raises(UsageError, match=r"^--local_rank 1 with LOCAL_RANK=0: "):
        parse_config("torchrun.py", "", (), given, {"LOCAL_RANK": "0"})
    with pytest.raises(UsageError, match=r"^--local_rank 1: spawn.py takes none, its ranks know theirs"):
        parse_config("spawn.py", "", (), given, {"LOCAL_RANK": "1"})
