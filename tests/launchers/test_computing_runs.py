"""Half precision, layouts, compiled models and uneven ranks, as real runs of several ranks."""

import json
import resource

import numpy as np
import pytest
import torch
from running import ROOT, command, run, trained

from common.command_line import parse_config
from common.datasets import load_datasets
from common.models import build_model
from common.rank import Rank
from common.sampling import make_sampler

pytestmark = pytest.mark.launch

# A model and a data set that write at the end, per rank, which parameters there are and which samples were trained on.
WITNESS = """
import atexit, json, os
import torch
from common import checkpoint, models

def write(name, content):
    if "RANK" in os.environ:
        with open(f"{name}.{os.environ['RANK']}.json", "w") as file:
            json.dump(content, file)

class Witness:
    def watch(self):
        write("start", checkpoint.sha256(self))
        atexit.register(lambda: write("end", checkpoint.sha256(self)))

class Net(models.CNN, Witness):
    def __init__(self):
        super().__init__()
        self.watch()

class Line(torch.nn.Module, Witness):
    factor = 1.0
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.layer.weight)
        self.watch()
    def forward(self, x):
        out = self.layer(x)
        return out * self.factor if self.training and os.environ["RANK"] == "1" else out

class Steep(Line):
    factor = 50.0  # rank 1's gradients are too large for fp16 until the scale has been halved about ten times

class Points:
    def __init__(self, train=True):
        self.n, self.train, self.seen = (101 if train else 20), train, []
        if train:
            atexit.register(lambda: write("seen", self.seen))
    def __len__(self):
        return self.n
    def __getitem__(self, i):
        return torch.tensor([i / 50.0]), torch.tensor([i / 25.0])
    def __getitems__(self, indices):
        if self.train:
            self.seen.append(list(indices))
        pairs = [self[i] for i in indices]
        return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])
"""


@pytest.fixture
def witness(tmp_path):
    """Runs ranks as ordinary processes with the witnesses; gives (result, what each rank wrote)."""
    (tmp_path / "witness.py").write_text(WITNESS)

    def launch(world_size, *flags):
        result = tmp_path / "result.json"
        words = command("plain", world_size, "--threads", 1, *flags, "--result", result)
        ended = run(words, cwd=tmp_path, PYTHONPATH=ROOT)
        assert ended.status == 0, ended
        wrote = {
            name: [json.loads((tmp_path / f"{name}.{r}.json").read_text()) for r in range(world_size)]
            for name in ("start", "end", "seen")
            if (tmp_path / f"{name}.0.json").exists()
        }
        return json.loads(result.read_text()), wrote, ended

    return launch


def compiled(words, tmp_path):
    """What ``--result`` holds after a run that may compile for minutes, where many programs run."""
    ended = run([*words, "--result", str(tmp_path / "compiled.json")], limit=400, TORCHINDUCTOR_CACHE_DIR=tmp_path / "cache")
    assert ended.status == 0, ended
    return json.loads((tmp_path / "compiled.json").read_text())


def difference(a, b):
    """The largest relative difference of two curves."""
    assert len(a) == len(b) > 0
    a, b = np.array(a, dtype=float), np.array(b, dtype=float)
    return float(np.max(np.abs(a - b) / np.abs(b)))


# ----------------------------------------------------------------------------------------------------- half precision


def test_bf16_and_channels_last_learn_the_digits_and_leave_equal_ranks(witness):
    result, wrote, ended = witness(2, "--model", "witness:Net", "--precision", "bf16", "--channels_last")
    assert result["eval_accuracy"][-1] > 0.9 and len(result["eval_accuracy"]) == 10
    assert len(set(wrote["end"])) == 1
    assert (result["precision"], result["channels_last"], result["fused_optimizer"]) == ("bf16", True, True)
    assert (result["compile"], result["sync_batchnorm"]) == (False, False)
    assert "Compute: autocast to bf16, float32 weights, channels_last, fused SGD" in ended.out
    assert "Warning" not in ended.err, ended


@pytest.mark.only_on("linux")
def test_kept_memory_is_not_fetched_again_every_step(tmp_path):
    faults, results = [], []
    for flags in ((), ("--keep_memory",)):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
        results.append(trained(command("plain", 1, "--epochs", 4, *flags), tmp_path / "result.json"))
        faults.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt - before)
    plain, kept = results
    assert kept["parameter_sha256"] == plain["parameter_sha256"]
    assert kept["keep_memory"] and not plain["keep_memory"]
    print("page faults", faults)
    assert faults[1] < 0.7 * faults[0], faults


@pytest.mark.parametrize("sync", ("ddp", "by_hand", "by_hand_flat"))
def test_channels_last_computes_the_same_whoever_averages(tmp_path, sync):
    flags = ("--epochs", 1, "--global_batch_size", 41, "--precision", "fp64", "--threads", 1)
    many = trained(command("spawn", 3, *flags, "--channels_last", "--sync", sync), tmp_path / "many.json")
    alone = trained(command("plain", 1, *flags), tmp_path / "alone.json")
    assert many["channels_last"] and not alone["channels_last"]
    assert difference(many["loss_per_step"], alone["loss_per_step"]) < 1e-9
    assert difference(many["eval_loss_per_epoch"], alone["eval_loss_per_epoch"]) < 1e-9


POINTS = ("--dataset", "witness:Points", "--precision", "fp16")


@pytest.mark.parametrize("sync", ("ddp", "by_hand", "by_hand_flat"))
def test_fp16_learns_and_leaves_equal_ranks(witness, sync):
    """Two passes a step: what is added up has one scale."""
    flags = ("--model", "witness:Line", *POINTS, "--lr", 0.05, "--global_batch_size", 20, "--epochs", 4, "--sync", sync)
    result, wrote, _ = witness(2, *flags, "--accumulate", 2)
    assert len(set(wrote["end"])) == 1
    assert result["eval_loss_per_epoch"][-1] < 0.01 * result["train_loss_per_epoch"][0]


@pytest.mark.parametrize("sync", ("ddp", "by_hand", "by_hand_flat"))
def test_where_one_rank_overflows_all_leave_the_step_out(witness, sync):
    flags = ("--model", "witness:Steep", *POINTS, "--lr", 1e-6, "--global_batch_size", 20, "--sync", sync)
    _, wrote, _ = witness(2, *flags, "--epochs", 1)  # six steps, too few
    assert wrote["end"] == wrote["start"] and len(set(wrote["end"])) == 1
    _, wrote, _ = witness(2, *flags, "--epochs", 4)
    assert wrote["end"] != wrote["start"] and len(set(wrote["end"])) == 1


# ------------------------------------------------------------------------------------------------------------- uneven


def uneven_alone(config, world_size):
    """Per step the mean loss over the samples that the active ranks bring, trained on by one process."""
    model = build_model(config).double()
    train, _ = load_datasets(config, torch.device("cpu"), torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=0.9)
    ranks = [Rank("test", r, world_size, r, world_size, 0, "127.0.0.1", 1) for r in range(world_size)]
    samplers = [make_sampler(config, len(train), rank) for rank in ranks]
    losses = []
    for epoch in range(config.epochs):
        steps = [list(sampler.epoch(epoch)) for sampler in samplers]
        for step in range(max(map(len, steps))):
            shares = [share for mine in steps if step < len(mine) for share in mine[step]]
            batch = torch.cat([share.indices[: share.samples] for share in shares])
            loss = model(train.x[batch], train.y[batch])["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "launcher, world_size, more",
    [
        ("plain", 2, ()),
        ("spawn", 3, ()),
        ("torchrun", 3, ("--accumulate", 2)),
        ("mpi", 4, ("--find_unused_parameters",)),
        ("spawn", 3, ("--sync", "shared_memory")),
        ("mpi", 3, ("--sync", "mpi", "--bucket_mb", 0.001)),
    ],
)
def test_uneven_ranks_compute_the_mean_over_those_that_have_data(tmp_path, launcher, world_size, more):
    """Over several epochs: the momentum of ranks that finished early must be the others', too."""
    flags = ("--job", "regression", "--sampler", "uneven", "--data_size", 463, "--global_batch_size", 23, "--epochs", 4,
             "--precision", "fp64", "--threads", 1, *more)  # fmt: skip
    many = trained(command(launcher, world_size, *flags), tmp_path / "many.json")
    config = parse_config("test", argv=[str(word) for word in flags], environment={})
    assert many["sampler"] == "uneven"
    assert difference(many["loss_per_step"], uneven_alone(config, world_size)) < 1e-9


@pytest.mark.parametrize("compress", ("fp16", "bf16", "int8", "powersgd"))
def test_uneven_ranks_that_compress_end_equal(witness, compress):
    """A rank without data left sends zeros, compressed as the others' gradients are."""
    result, wrote, _ = witness(
        3, "--model", "witness:Net", "--dataset", "digits", "--sampler", "uneven", "--epochs", 2, "--compress", compress
    )
    assert len(set(wrote["end"])) == 1 and wrote["end"] != wrote["start"]
    assert result["train_loss_per_epoch"][1] < result["train_loss_per_epoch"][0]


def test_uneven_ranks_see_every_sample_once_and_end_equal(witness):
    flags = ("--model", "witness:Net", "--dataset", "digits", "--sampler", "uneven", "--epochs", 2)
    _, wrote, _ = witness(3, *flags)
    assert len(set(wrote["end"])) == 1
    assert wrote["end"] != wrote["start"]
    flags = ("--model", "witness:Line", "--dataset", "witness:Points", "--sampler", "uneven", "--epochs", 2, "--lr", 1e-3)
    _, wrote, _ = witness(3, *flags, "--global_batch_size", 12)
    trained_on = [batches[2:] for batches in wrote["seen"]]  # two looks at it come before
    assert [len(batches) for batches in trained_on] == [2 * 7, 2 * 9, 2 * 11]
    for epoch in (0, 1):
        shares = [batches[epoch * len(batches) // 2 : (epoch + 1) * len(batches) // 2] for batches in trained_on]
        assert sorted(index for share in shares for batch in share for index in batch) == list(range(101))
        assert [sum(map(len, share)) for share in shares] == [25, 33, 43]


# ------------------------------------------------------------------------------------------------------------ compiled


@pytest.mark.parametrize(
    "launcher, more",
    [("spawn", ()), ("torchrun", ("--accumulate", 2)), ("plain", ("--sync", "by_hand_flat"))],
)
def test_a_compiled_model_computes_the_same(tmp_path, launcher, more):
    """Compiled by each rank, forked from a server or not; nothing is left of it (``running`` sees to that)."""
    flags = (
        "--job",
        "regression",
        "--data_size",
        463,
        "--global_batch_size",
        23,
        "--epochs",
        2,
        "--precision",
        "fp64",
        "--threads",
        1,
    )
    many = compiled(command(launcher, 2, *flags, "--compile", *more), tmp_path)
    alone = trained(command("plain", 1, *flags), tmp_path / "alone.json")
    assert many["compile"] and not alone["compile"] and any((tmp_path / "cache").iterdir())
    assert difference(many["loss_per_step"], alone["loss_per_step"]) < 1e-9
    assert difference(many["eval_loss_per_epoch"], alone["eval_loss_per_epoch"]) < 1e-9


def test_compiled_in_bf16_with_channels_last(tmp_path):
    flags = ("--compile", "--precision", "bf16", "--channels_last", "--epochs", 4, "--threads", 1)
    result = compiled(command("spawn", 2, *flags), tmp_path)
    assert result["eval_accuracy"][-1] > 0.9
