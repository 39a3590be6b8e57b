"""N ranks compute what one process computes, whoever launched them."""

import functools
import json

import numpy as np
import pytest
import torch
from running import LAUNCHERS, MPIS, SPAWNS, command, run, trained

from common.command_line import parse_config
from common.datasets import load_datasets
from common.models import build_model

pytestmark = pytest.mark.launch

# Batches are primes: none of 2, 3, 4, 5 ranks divides them. The last batch has 2, 1 and 3 samples.
JOBS = {
    "digits": ("--epochs", 1, "--global_batch_size", 41),
    "random": ("--epochs", 3, "--global_batch_size", 17, "--data_size", 341),
    "regression": ("--epochs", 3, "--global_batch_size", 23, "--data_size", 463),
}
STEPS = {"digits": 36, "random": 63, "regression": 63}
WORLD_SIZES = (1, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One run a (launcher, world size, job, precision), however many tests look at it; None: a process on its own."""

    @functools.cache
    def get(launcher, world_size, job, precision, *more):
        flags = ("--job", job, *JOBS[job], "--precision", precision, "--threads", 1, *more)
        file = tmp_path_factory.mktemp("parity") / "result.json"
        if launcher is None:
            return trained(["python", "launchers/plain.py", *map(str, flags)], file)
        if launcher == "plain" and world_size == 1:  # a group of one: the variables say so, no other rank is started
            words = ["python", "launchers/plain.py", *map(str, flags)]
            return trained(words, file, RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=0)
        return trained(command(launcher, world_size, *flags), file)

    return get


def difference(a, b):
    """The largest relative difference of two curves."""
    assert len(a) == len(b) > 0
    a, b = np.array(a, dtype=float), np.array(b, dtype=float)
    return float(np.max(np.abs(a - b) / np.abs(b)))


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_whole_curve_in_fp64(results, launcher, world_size, job):
    alone, many = results(None, 1, job, "fp64"), results(launcher, world_size, job, "fp64")
    assert alone["backend"] is None and many["backend"] == "gloo"
    assert (many["launcher"], many["world_size"]) == (launcher, world_size)
    assert len(alone["loss_per_step"]) == STEPS[job]
    for curve in ("loss_per_step", "train_loss_per_epoch", "eval_loss_per_epoch"):
        assert difference(many[curve], alone[curve]) < 1e-9, curve
    assert many["eval_accuracy"] == alone["eval_accuracy"]


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_same_bits_under_every_launcher(results, world_size, job):
    digests = {results(launcher, world_size, job, "fp64")["parameter_sha256"] for launcher in LAUNCHERS}
    assert len(digests) == 1


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_first_twenty_steps_in_fp32(results, world_size, job):
    launcher = LAUNCHERS[(world_size + list(JOBS).index(job)) % 4]  # in turn: the loop does not know who launched it
    alone, many = results(None, 1, job, "fp32"), results(launcher, world_size, job, "fp32")
    assert difference(many["loss_per_step"][:20], alone["loss_per_step"][:20]) < 1e-5


def test_same_bits_under_every_launcher_in_fp32(results):
    digests = {results(launcher, 3, "random", "fp32")["parameter_sha256"] for launcher in (*LAUNCHERS, *MPIS)}
    assert len(digests) == 1


@pytest.mark.parametrize("mpi", MPIS)
@pytest.mark.parametrize("world_size", (1, 3, 4))
def test_other_mpis(results, mpi, world_size):
    alone, many = results(None, 1, "random", "fp64"), results(mpi, world_size, "random", "fp64")
    assert many["world_size"] == world_size
    assert difference(many["loss_per_step"], alone["loss_per_step"]) < 1e-9
    assert many["parameter_sha256"] == results("mpi", world_size, "random", "fp64")["parameter_sha256"]


@pytest.mark.parametrize("launcher, world_size", [("elastic", 1), ("elastic", 3), *((spawn, 3) for spawn in SPAWNS)])
def test_other_ways_to_start_python(results, launcher, world_size):
    alone, many = results(None, 1, "random", "fp64"), results(launcher, world_size, "random", "fp64")
    assert many["world_size"] == world_size and launcher in (many["launcher"], f"{many['launcher']} ({many['start_method']})")
    for curve in ("loss_per_step", "train_loss_per_epoch", "eval_loss_per_epoch"):
        assert difference(many[curve], alone[curve]) < 1e-9, curve
    assert many["parameter_sha256"] == results("plain", world_size, "random", "fp64")["parameter_sha256"]


@pytest.mark.parametrize("job", ("random", "regression"))
def test_a_process_on_its_own_computes_what_a_plain_loop_computes(results, job):
    """Without it all of the above could agree on something wrong."""
    words = ["--job", job, *map(str, JOBS[job])]
    config = parse_config("test", argv=words, environment={})
    model = build_model(config).double()
    train, evaluation = load_datasets(config, torch.device("cpu"), torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=0.9)
    steps, evals = [], []
    for epoch in range(config.epochs):
        order = np.random.default_rng([config.seed, epoch]).permutation(len(train))
        for start in range(0, len(train), config.global_batch_size):
            batch = torch.from_numpy(order[start : start + config.global_batch_size])
            loss = model(train.x[batch], train.y[batch])["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        with torch.no_grad():
            evals.append(model(evaluation.x, evaluation.y)["loss"].item())
    alone = results(None, 1, job, "fp64")
    assert difference(alone["loss_per_step"], steps) < 1e-9
    assert difference(alone["eval_loss_per_epoch"], evals) < 1e-9


def test_distributed_sampler_pads_and_so_differs(results):
    flags = ("--global_batch_size", 16, "--sampler", "distributed")
    alone = results(None, 1, "random", "fp64", *flags)
    padded = results("torchrun", 2, "random", "fp64", *flags)
    assert padded["sampler"] == "distributed"
    assert difference(padded["loss_per_step"], alone["loss_per_step"]) > 1e-3


@pytest.mark.parametrize("launcher, world_size, parts", [("plain", 2, 3), ("spawn", 3, 2), ("torchrun", 2, 12)])
def test_accumulation_is_one_pass(results, launcher, world_size, parts):
    many = results(launcher, world_size, "random", "fp64", "--accumulate", parts)
    assert difference(many["loss_per_step"], results(None, 1, "random", "fp64")["loss_per_step"]) < 1e-9


def test_batch_size_is_per_rank(tmp_path):
    """8 on 3 ranks is a global batch of 24."""
    flags = ("--job", "random", "--epochs", 1, "--data_size", 100, "--precision", "fp64", "--threads", 1)
    many = trained(command("spawn", 3, *flags, "--batch_size", 8), tmp_path / "many.json")
    alone = trained(["python", "launchers/plain.py", *map(str, flags), "--global-batch-size", "24"], tmp_path / "alone.json")
    assert many["global_batch_size"] == alone["global_batch_size"] == 24
    assert difference(many["loss_per_step"], alone["loss_per_step"]) < 1e-9


def test_users_own_model_and_data(tmp_path):
    """A class of the user's own, plain logits and per-sample items, is cut up as exactly as a built-in one."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(3, 4)\n"
        "    def forward(self, x):\n"
        "        return self.layer(x)\n"
        "class Points:\n"
        "    def __init__(self, train=True):\n"
        "        self.n = 47 if train else 13\n"
        "    def __len__(self):\n"
        "        return self.n\n"
        "    def __getitem__(self, i):\n"
        "        return torch.tensor([i / 50, i % 3 - 1.0, i % 5 / 5]), i % 4\n"
    )
    flags = ["--model", "mine:Net", "--dataset", "mine:Points", "--global_batch_size", 9, "--epochs", 2, "--precision", "fp64"]
    results = []
    for name, launcher, world_size in (("alone", "plain", 1), ("many", "torchrun", 3)):
        file = tmp_path / f"{name}.json"
        ended = run([*command(launcher, world_size, *flags), "--result", str(file)], cwd=tmp_path)
        assert ended.status == 0, str(ended)
        results.append(json.loads(file.read_text()))
    assert results[0]["backend"] is None and results[1]["world_size"] == 3
    assert difference(results[1]["loss_per_step"], results[0]["loss_per_step"]) < 1e-9
    assert difference(results[1]["eval_loss_per_epoch"], results[0]["eval_loss_per_epoch"]) < 1e-9
