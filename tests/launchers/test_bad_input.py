"""What cannot work is refused before training: one line, once, exit status 2, no traceback (torchrun: its own status 1)."""

import re

import pytest
from running import ALL, ROOT, SPAWNS, Run, command, run, tracebacks_of_ours

pytestmark = pytest.mark.launch

RANDOM = ("--job", "random")
USERS = """
import torch

class NoModel:
    pass

class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(7, 2)
    def forward(self, x):
        return self.layer(x)

class Needs(torch.nn.Module):
    def __init__(self, depth_of_the_sea):
        super().__init__()

class Empty:
    def __len__(self):
        return 0
    def __getitem__(self, i):
        raise IndexError(i)
"""


def refused(ended, line, launcher):
    """Asserts that ``line`` (a pattern) is all that was said, once, and that nothing was trained."""
    assert ended.status == (1 if launcher == "torchrun" else 2), str(ended)
    errors = re.findall(r"^error: .*$", ended.err, re.MULTILINE)
    assert len(errors) == 1, str(ended)
    assert re.search(line, errors[0]), str(ended)
    assert tracebacks_of_ours(ended) == 0, str(ended)
    assert "Epoch" not in ended.out and "Model:" not in ended.out, str(ended)
    others = [row for row in ended.err.splitlines() if row and row not in errors]
    if launcher == "torchrun":  # its notice about OMP_NUM_THREADS may come before; its report comes after
        report = ended.err.find("ChildFailedError")
        assert -1 < ended.err.index(errors[0]) < report, str(ended)
    elif launcher.startswith(("plain", "spawn", "elastic")):
        assert others == [], str(ended)
    else:  # MPICH and Open MPI have their own words about a status that is not 0
        assert not [row for row in others if "Rank " in row or "Error:" in row or "warning" in row.lower()], str(ended)


FLAGS = {
    "negative epochs": (("--epochs", -1), r"--epochs -1: not allowed; give a whole number, 1 or more"),
    "batch above data": (("--global_batch_size", 5000), r"--global_batch_size 5000: larger than the data \(4096"),
    "per-rank batch above data": (
        ("--batch-size", 4000),
        r"--batch_size 4000 on 2 ranks, 8000 samples a step: larger than the data",
    ),
    "unknown backend": (
        ("--backend", "glo"),
        r"--backend glo: not allowed; give one of auto, gloo, nccl \(did you mean gloo\?\)",
    ),
    "nccl without GPUs": (("--backend", "nccl", "--device", "cpu"), r"--backend nccl"),
    "no such folder": (("--result", "nowhere/result.json"), r"--result nowhere/result.json: there is no folder"),
    "a folder": (("--result", "."), r"--result \.: is a folder"),
    "both batches": (("--batch_size", 8, "--global_batch_size", 16), r"batch_size 8 together with global_batch_size 16"),
    "another job's flag": (("--hidden_size", 8), r"--hidden_size 8: .* belongs to --job regression"),
    "unknown flag": (("--epoch", 3), r"--epoch: no such flag; did you mean --epochs\?"),
    "no number": (("--lr", "fast"), r"--learning_rate fast: not allowed; give a number above 0"),
    "cannot be imported": (("--model", "no.such:Net"), r"--model no.such:Net: no.such cannot be imported"),
    "no such class": (("--model", "users:Ned"), r"--model users:Ned: users has no class Ned"),
    "no model": (("--model", "users:NoModel"), r"--model users:NoModel: does not fit"),
    "does not fit": (("--model", "users:Wide"), r"--model users:Wide does not fit --dataset random \(x \(2, 20\)"),
    "cannot be made": (("--model", "users:Needs"), r"--model users:Needs: Needs\(\) cannot be made"),
    "no data": (("--dataset", "users:Empty"), r"--dataset users:Empty: "),
    "uneven by hand": (("--sampler", "uneven", "--sync", "by_hand"), r"--sampler uneven with --sync by_hand: a rank without data"),
    "uneven below one": (("--sampler", "uneven", "--global_batch_size", 1), r"--sampler uneven with --global_batch_size 1 on 2 r"),
    "statistics on cpu": (("--sync_batchnorm", "--device", "cpu"), r"--sync_batchnorm on cpu: PyTorch's SyncBatchNorm runs on C"),
    "sampler cannot share": (("--sampler", "distributed", "--global_batch_size", 63), r"--sampler distributed .*63: 2 parts"),
}


# Under every launcher one of each place where something is refused: the command line, the world, a rank, a rank's model and data.
PLACES = ("negative epochs", "per-rank batch above data", "nccl without GPUs", "no such class", "does not fit", "no data")
# The other flags meet the same code there: each under two launchers, in turn.
IN_TURN = [name for name in FLAGS if name not in PLACES]


@pytest.mark.parametrize(
    "launcher, case",
    [
        *((launcher, case) for launcher in ALL for case in PLACES),
        *((ALL[(number + k) % len(ALL)], case) for number, case in enumerate(IN_TURN) for k in (0, 2)),
        *((launcher, "does not fit") for launcher in SPAWNS),
    ],
)
def test_flags(tmp_path, launcher, case):
    flags, line = FLAGS[case]
    (tmp_path / "users.py").write_text(USERS)
    before = set(tmp_path.iterdir())
    ended = run(command(launcher, 2, *RANDOM, *flags), cwd=tmp_path)
    refused(ended, line, launcher)
    assert {path for path in tmp_path.iterdir() if path.name != "__pycache__"} == before


@pytest.mark.parametrize("launcher", ("spawn", "torchrun", "mpi"))
def test_no_compiler(launcher):
    ended = run(command(launcher, 2, *RANDOM, "--compile", "--device", "cpu"), CXX="/nowhere/g++")
    refused(ended, r"--compile: no C\+\+ compiler \(/nowhere/g\+\+ cannot be run\); install one", launcher)


@pytest.mark.parametrize("case", ("negative epochs", "does not fit"))
@pytest.mark.parametrize("launcher", ("openmpi", "systemmpi"))
def test_flags_under_other_mpis(tmp_path, launcher, case):
    flags, line = FLAGS[case]
    (tmp_path / "users.py").write_text(USERS)
    refused(run(command(launcher, 2, *RANDOM, *flags), cwd=tmp_path), line, launcher)


@pytest.mark.parametrize("case", ("does not fit", "batch above data", "no data"))
def test_flags_of_a_process_on_its_own(tmp_path, case):
    flags, line = FLAGS[case]
    (tmp_path / "users.py").write_text(USERS)
    refused(run(command("plain", 1, *RANDOM, *flags), cwd=tmp_path), line, "plain")


@pytest.mark.only_on("linux")
@pytest.mark.parametrize("launcher", ALL)
def test_a_folder_that_nobody_can_write(tmp_path, launcher):
    """Not even root can make a file in /proc."""
    ended = run(command(launcher, 2, *RANDOM, "--result", "/proc/result.json"), cwd=tmp_path)
    refused(ended, r"--result /proc/result.json: cannot be written", launcher)


@pytest.mark.parametrize("launcher", ("plain", "spawn"))
@pytest.mark.parametrize(
    "flags, line",
    [
        (("--world_size", 0), r"--world_size 0: not allowed; give a whole number, 1 or more"),
        (("--nproc_per_node", 2, "--world_size", 3), r"--world_size 3 .* --nproc_per_node 2: ranks in all must be nodes × ranks"),
        (("--nnodes", 2), r"--nnodes 2 without --master_addr"),
        (("--nnodes", 2, "--node_rank", 2, "--master_addr", "127.0.0.1"), r"--node_rank 2 with --nnodes 2: give 0 to 1"),
        (("--master_port", 70000), r"--master_port 70000: not allowed"),
    ],
)
def test_how_many_ranks(tmp_path, launcher, flags, line):
    words = ["python", str(ROOT / "launchers" / f"{launcher}.py"), *RANDOM, *map(str, flags)]
    refused(run(words, cwd=tmp_path), line, launcher)


@pytest.mark.parametrize(
    "launcher, flags, line",
    [
        ("spawn", ("--start_method", "thread"), r"--start_method thread: not allowed; give one of forkserver, spawn, fork"),
        ("elastic", ("--start_method", "thread"), r"--start_method thread: not allowed; give one of forkserver, spawn, fork"),
        ("plain", ("--start_method", "fork"), r"--start_method is not this launcher's to take"),
        ("spawn", ("--nnodes", "1:2"), r"--nnodes 1:2: only elastic.py takes a range"),
        ("elastic", ("--nnodes", "2:1"), r"--nnodes 2:1: not allowed; give a whole number, 1 or more, or two as MIN:MAX"),
        ("elastic", ("--nnodes", "1:2"), r"--nnodes 2 without --master_addr: name the host where the nodes meet"),
        ("elastic", ("--max_restarts", -1), r"--max_restarts -1: not allowed; give a whole number, 0 or more"),
        ("elastic", ("--nproc_per_node", 0), r"--nproc_per_node 0: not allowed; give a whole number, 1 or more"),
    ],
)
def test_how_to_start_them(tmp_path, launcher, flags, line):
    refused(run(command(launcher, 2, *RANDOM, *flags), cwd=tmp_path), line, launcher)


@pytest.mark.parametrize("launcher", ("torchrun", "mpi", "elastic"))
def test_a_launcher_that_is_told_its_ranks_takes_no_world_size(tmp_path, launcher):
    refused(
        run(command(launcher, 2, *RANDOM, "--world_size", 2), cwd=tmp_path),
        "--world_size (does not belong to|is not this launcher's)",
        launcher,
    )


ENVIRONMENTS = {
    "rank too large": ({"RANK": 2, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}, r"RANK 2 with WORLD_SIZE 2"),
    "no address": ({"RANK": 0, "WORLD_SIZE": 2}, r"WORLD_SIZE 2 without MASTER_ADDR"),
    "no world size": ({"RANK": 0}, r"WORLD_SIZE is not set, but RANK(, LOCAL_RANK)? is"),
    "no rank": ({"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}, r"RANK is not set, but (LOCAL_RANK, )?WORLD_SIZE is"),
    "world size 0": ({"RANK": 0, "WORLD_SIZE": 0, "MASTER_ADDR": "127.0.0.1"}, r"WORLD_SIZE 0"),
    "no number": ({"RANK": "first", "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}, r"RANK=first: not allowed"),
    "negative": ({"RANK": -1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}, r"RANK=-1: not allowed"),
}


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_environment_of_a_hand_started_rank(tmp_path, case):
    environment, line = ENVIRONMENTS[case]
    words = ["python", str(ROOT / "launchers/plain.py"), *RANDOM]
    refused(run(words, cwd=tmp_path, **environment), line, "plain")


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_environment_of_a_rank_whose_launcher_set_it_wrongly(tmp_path, case):
    environment, line = ENVIRONMENTS[case]
    words = ["python", str(ROOT / "launchers/torchrun.py"), *RANDOM]
    ended = run(words, cwd=tmp_path, LOCAL_RANK=0, MASTER_PORT=29400, **environment)
    refused(ended, line, "plain")  # without torchrun itself there is no report of torchrun's


def test_torchrun_file_without_torchrun(tmp_path):
    ended = run(["python", str(ROOT / "launchers/torchrun.py")], cwd=tmp_path)
    refused(ended, r"RANK and WORLD_SIZE are not set: torchrun sets them; type torchrun --nproc_per_node=2", "plain")


@pytest.mark.parametrize("variables", ({"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}, {"RANK": 1}, {"WORLD_SIZE": 2}))
def test_spawn_within_a_rank(tmp_path, variables):
    ended = run(command("spawn", 2, *RANDOM), cwd=tmp_path, **variables)
    refused(ended, r"in the environment: spawn.py numbers its ranks itself", "spawn")


def test_plain_that_is_told_two_world_sizes(tmp_path):
    ended = run(command("plain", 3, *RANDOM), cwd=tmp_path, RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1")
    refused(ended, r"--world_size 3 with WORLD_SIZE=2 in the environment", "plain")


@pytest.mark.parametrize("launcher", ALL)
def test_malformed_dotenv(tmp_path, launcher):
    (tmp_path / ".env").write_text("EPOCHS=1\nthis is no setting\n")
    refused(run(command(launcher, 2, *RANDOM), cwd=tmp_path), r"\.env, line 2: 'this is no setting' is no NAME=value", launcher)


@pytest.mark.parametrize("launcher", ALL)
def test_bad_value_in_dotenv(tmp_path, launcher):
    (tmp_path / ".env").write_text("EPOCHS=many\n")
    refused(run(command(launcher, 2, *RANDOM), cwd=tmp_path), r"EPOCHS \(environment or \.env\) many: not allowed", launcher)


@pytest.mark.parametrize("launcher", ("mpi", "openmpi", "systemmpi"))
def test_mpi_ranks_that_disagree(tmp_path, launcher):
    first = command(launcher, 1, *RANDOM, "--epochs", 1)
    second = command(launcher, 1, *RANDOM, "--epochs", 2)[1:]
    ended = run([*first, ":", *second], cwd=tmp_path)
    refused(ended, r"rank 1 was given epochs 2 where rank 0 has 1: ranks must agree", launcher)


@pytest.mark.parametrize("launcher", ("mpi", "openmpi", "systemmpi"))
@pytest.mark.parametrize("bad", (0, 1))
def test_mpi_ranks_of_which_one_is_told_nonsense(tmp_path, launcher, bad):
    epochs = [1, 1]
    epochs[bad] = -5
    first, second = (command(launcher, 1, *RANDOM, "--epochs", n) for n in epochs)
    refused(run([*first, ":", *second[1:]], cwd=tmp_path), r"--epochs -5: not allowed", launcher)


def test_hand_started_ranks_that_disagree(tmp_path, free_port):
    both = []
    for rank, seed in ((0, 1), (1, 7)):
        words = ["python", str(ROOT / "launchers/plain.py"), *RANDOM, "--seed", str(seed)]
        both.append(Run(words, cwd=tmp_path, RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port))
    first, second = (each.finish() for each in both)
    assert (first.status, second.status) == (2, 2), f"{first}\n{second}"
    said = "error: rank 1 was given seed 7 where rank 0 has 1: ranks must agree; give all the same flags\n"
    assert first.err + second.err == said
