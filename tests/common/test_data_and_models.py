"""datasets.py, models.py, checkpoint.py, device.py."""

import hashlib
import os
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from common import checkpoint, datasets, device, models
from common.command_line import parse_config
from common.config import FIELDS, RANK_FLAGS
from common.rank import Rank
from tests.common.helpers import ROOT, refusal

CPU = torch.device("cpu")


def config(line=""):
    return parse_config("test.py", "", RANK_FLAGS, line.split(), {})


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a module of the user's own into the current folder; its name."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"own_{os.getpid()}_{tmp_path.name}"
    name = re.sub(r"\W", "_", name)

    def write(text):
        (tmp_path / f"{name}.py").write_text("import torch\nfrom torch import nn\n" + text)
        return name

    yield write
    sys.modules.pop(name, None)


# ---------------------------------------------------------------------------------------------------------- data sets


def test_the_digits_are_the_ones_that_are_described():
    told = re.search(r"`([0-9a-f]{64})`", (ROOT / "common/data/DIGITS.md").read_text(encoding="utf-8"))
    with np.load(ROOT / "common/data/digits.npz") as file:
        images, labels = file["images"], file["labels"]
    assert told and hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() == told[1]
    assert images.shape == (1797, 8, 8) and labels.shape == (1797,)


def test_the_digits_split():
    train, test = datasets.digits()
    assert (len(train), len(test)) == (1437, 360)
    for part in (train, test):
        assert part.x.shape[1:] == (1, 28, 28) and part.x.dtype == torch.float32 and part.y.dtype == torch.int64
        assert abs(part.x.mean()) < 0.05 and 0.95 < part.x.std() < 1.05
        assert part.y.unique().tolist() == list(range(10))
    again, _ = datasets.digits()
    assert torch.equal(train.x, again.x) and torch.equal(train.y, again.y)


def test_the_split_is_fixed_disjoint_and_complete():
    train, test = datasets.split(datasets.Tensors(torch.arange(1797), torch.arange(1797)))
    assert sorted([*train.x.tolist(), *test.x.tolist()]) == list(range(1797))
    assert train.x[:5].tolist() == [360, 1773, 1482, 600, 850]  # another split would make old results incomparable


@pytest.mark.parametrize("name", ["random", "regression"])
def test_generated_data_depend_on_the_seed_only(name):
    def made(seed):
        torch.rand(1)  # other uses of chance do not matter
        return datasets.load_datasets(config(f"--job {name} --data_size 40 --seed {seed}"), CPU, torch.float32)

    one, same, other = made(1), made(1), made(2)
    assert [len(part) for part in one] == [40, 10]
    for a, b, c in zip(one, same, other, strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
        assert not torch.equal(a.x, c.x)
    assert not torch.equal(one[0].x[:10], one[1].x)  # evaluated on samples of their own


def test_shapes_of_generated_data():
    (train, _) = datasets.random(50, 7, 0)
    assert train.x.shape == (50, 7) and train.y.shape == (50,) and set(train.y.tolist()) == {0, 1}
    (train, _) = datasets.regression(400, 0)
    assert train.x.shape == train.y.shape == (400, 1) and -2 <= train.x.min() and train.x.max() <= 2
    noise = train.y - torch.sin(3 * train.x) - train.x / 2
    assert 0.08 < noise.std() < 0.12
    assert len(datasets.random(1, 1, 0)[1]) == 1


def test_precision_is_that_of_the_run():
    train, _ = datasets.load_datasets(config("--job random --data_size 8"), CPU, torch.float64)
    assert train.x.dtype == torch.float64 and train.y.dtype == torch.int64


def test_a_batch_is_the_samples_asked_for():
    train, _ = datasets.regression(20, 0)
    x, y = datasets.fetch(train, torch.tensor([3, 1, 3]), CPU, torch.float32)
    assert torch.equal(x, torch.stack([train[i][0] for i in (3, 1, 3)])) and torch.equal(y[1], train[1][1])


@given(st.integers(0, 40), st.integers(1, 9))
def test_ranks_together_evaluate_each_sample_once(length, world):
    parts = [range(length)[datasets.eval_share(length, world, rank)] for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(length))


PAIRS = """
class Plain:
    def __init__(self, data_size, seed=0):
        self.n, self.seed = data_size, seed
    def __len__(self): return self.n
    def __getitem__(self, i):
        if not 0 <= i < self.n: raise IndexError(i)
        return torch.full((2,), float(i)), i % 3

class InParts(Plain):
    def __init__(self, train=True):
        super().__init__(12 if train else 4)
        self.train = train

class Gathers(Plain):
    calls = 0
    def __getitems__(self, indices):
        type(self).calls += 1
        return [self[i] for i in indices]

class GathersTensors(Plain):
    def __getitems__(self, indices):
        return torch.tensor([[float(i)] * 2 for i in indices]), torch.tensor([i % 3 for i in indices])
"""


def load(name, kind, line="--data_size 20"):
    return datasets.load_datasets(config(f"--dataset {name}:{kind} --model m:M {line}"), CPU, torch.float64)


def all_of(part):
    return datasets.fetch(part, torch.arange(len(part)), CPU, torch.float64)


@pytest.mark.parametrize("kind", ["Plain", "Gathers", "GathersTensors"])
def test_a_class_without_parts_is_split(own, kind):
    train, test = load(own(PAIRS), kind)
    assert (len(train), len(test)) == (16, 4)
    (x, y), (ex, _) = all_of(train), all_of(test)
    assert x.shape == (16, 2) and x.dtype == torch.float64 and y.dtype == torch.int64
    assert sorted(torch.cat([x[:, 0], ex[:, 0]]).tolist()) == list(range(20))
    assert torch.equal(x[:, 0].long() % 3, y)
    assert torch.equal(train[3][0].double(), x[3])


def test_a_split_class_gathers_in_one_call(own):
    name = own(PAIRS)
    train, _ = load(name, "Gathers")
    kind = sys.modules[name].Gathers
    before = kind.calls
    all_of(train)
    assert kind.calls == before + 1


def test_a_class_with_a_train_part_is_made_twice(own):
    train, test = load(own(PAIRS), "InParts", "")
    assert (len(train), len(test), train.train, test.train) == (12, 4, True, False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("class D: pass", "does not fit (TypeError"),
        ("class D:\n    def __len__(self): return 0\n    def __getitem__(self, i): raise IndexError(i)", "is empty"),
        ("class D:\n    def __len__(self): return 9\n    def __getitem__(self, i): return 1, 2, 3", "does not fit (ValueError"),
        ("class D:\n    def __len__(self): return 9\n    def __getitem__(self, i): return 5", "does not fit (TypeError"),
        ("class D:\n    def __len__(self): return 9\n    def __getitem__(self, i): return object(), 1", "does not fit (TypeError"),
        ("class D:\n    def __len__(self): return 9\n    def __getitem__(self, i): return [1., 2.], 1", "does not fit ("),
        ("class D:\n    def __len__(self): return 9\n    def __getitem__(self, i): raise OSError('no file')", "no file"),
        ("class D:\n    def __init__(self, where): pass", "cannot be made (TypeError"),
        ("class D:\n    def __len__(self): return 1\n    def __getitem__(self, i): return 1., 2.", "5 samples or more"),
        ("", "has no class D"),
    ],
)
def test_a_data_set_that_does_not_fit_is_refused(own, text, said):
    name = own(text)
    told = refusal(load, name, "D")
    assert f"--dataset {name}:D" in told and said in told


# ------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("line", "count", "x", "classes"),
    [
        ("", 421_642, (5, 1, 28, 28), 10),
        ("--job random", 42, (5, 20), 2),
        ("--job random --input_size 3", 8, (5, 3), 2),
        ("--job regression", 4_481, (5, 1), 1),
        ("--job regression --hidden_size 8", 8 * 2 + 8 * 9 + 16 + 9, (5, 1), 1),
    ],
)
def test_built_in_models(line, count, x, classes):
    model = models.build_model(config(line))
    assert models.count_parameters(model) == count
    inputs = torch.rand(x)
    labels = torch.rand(5, 1) if classes == 1 else torch.tensor([0, 1, 1, 0, 1])
    assert set(model(inputs)) == {"logits"}
    output = model(inputs, labels)
    assert set(output) == {"logits", "loss"} and output["logits"].shape == (5, classes) and output["loss"].shape == ()
    assert models.takes_labels(model) and models.batch_dependent(model) == []
    assert f"{count:,}" in models.describe(model).splitlines()[-1]


@pytest.mark.parametrize("line", ["", "--job random", "--job regression"])
def test_the_loss_is_a_mean_over_samples(line):
    model = models.build_model(config(line)).double()
    data, _ = datasets.load_datasets(config(line), CPU, torch.float64)
    x, y = datasets.fetch(data, torch.arange(6), CPU, torch.float64)
    whole, _ = models.loss_and_logits(model, True, x, y)
    single = [float(models.loss_and_logits(model, True, x[i : i + 1], y[i : i + 1])[0].detach()) for i in range(6)]
    assert float(whole.detach()) == pytest.approx(sum(single) / 6, rel=1e-12)


def test_the_seed_decides_the_weights():
    one, same, other = (checkpoint.sha256(models.build_model(config(f"--job random --seed {s}"))) for s in (1, 1, 2))
    assert one == same != other


NETS = """
class Logits(nn.Module):
    def __init__(self, input_size=4):
        super().__init__()
        self.layer = nn.Linear(input_size, 2)
    def forward(self, x): return self.layer(x)

class OnlyLogits(Logits):
    def forward(self, x, labels=None): return {"logits": self.layer(x)}

class Noisy(Logits):
    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(2), nn.Dropout(0.5)
    def forward(self, x): return self.drop(self.norm(self.layer(x))) + 0 * torch.rand(1)

class PerSample(Logits):
    def forward(self, x, labels): return {"logits": x, "loss": nn.functional.cross_entropy(self.layer(x), labels, reduction="none")}

class NoLogits(Logits):
    def forward(self, x, labels=None): return {"loss": self.layer(x).mean()}

class Still(nn.Module):
    def forward(self, x): return x

class NoModule: pass
"""
X, Y = torch.rand(3, 4), torch.tensor([0, 1, 1])


@pytest.mark.parametrize(("kind", "labels"), [("Logits", False), ("OnlyLogits", True)])
def test_a_model_of_ones_own_may_return_plain_logits(own, kind, labels):
    told = config(f"--model {own(NETS)}:{kind} --input_size 4")
    model = models.build_model(told)
    assert models.takes_labels(model) is labels
    loss, logits = models.loss_and_logits(model, labels, X, Y)
    assert torch.equal(loss, nn.functional.cross_entropy(logits, Y))
    assert models.check_fit(told, model, X, Y) is None


@pytest.mark.parametrize("training", [True, False])
def test_check_fit_leaves_model_and_random_state_unchanged(own, training):
    told = config(f"--model {own(NETS)}:Noisy")
    model = models.build_model(told).train(training)
    before, state = checkpoint.sha256(model), torch.get_rng_state()
    models.check_fit(told, model, X, Y)
    assert checkpoint.sha256(model) == before and torch.equal(torch.get_rng_state(), state)
    assert model.training is training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "x", "y", "said"),
    [
        ("Logits", torch.rand(3, 5), Y, "x (3, 5), y (3,)"),
        ("Logits", X, torch.tensor([0, 1, 7]), "IndexError"),
        ("Logits", X, torch.rand(3, 1), "must have the same shape"),
        ("PerSample", X, Y, "its loss has shape (3,)"),
        ("NoLogits", X, Y, "KeyError: 'logits'"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(own, kind, x, y, said):
    told = config(f"--model {own(NETS)}:{kind} --input_size 4")
    text = refusal(models.check_fit, told, models.build_model(told), x, y)
    assert said in text and f"{kind} does not fit --dataset digits" in text


@pytest.mark.parametrize("kind", ["Still", "NoModule"])
def test_what_cannot_be_trained_is_refused(own, kind):
    assert "must be a torch.nn.Module" in refusal(models.build_model, config(f"--model {own(NETS)}:{kind}"))


def test_labels_are_never_stretched_over_logits():
    with pytest.raises(ValueError, match="same shape"):
        models.mean_loss(torch.rand(4, 1), torch.rand(4))


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (nn.BatchNorm2d(3), ["BatchNorm2d"]),
        (nn.SyncBatchNorm(3), ["SyncBatchNorm"]),
        (nn.Dropout(0.1), ["Dropout"]),
        (nn.Dropout(0.0), []),
        (nn.LayerNorm(3), []),
        (nn.GroupNorm(1, 3), []),
        (nn.LSTM(2, 2, num_layers=2, dropout=0.5), ["LSTM"]),
        (nn.LSTM(2, 2), []),
        (nn.MultiheadAttention(2, 1, dropout=0.5), ["MultiheadAttention"]),
        (nn.RReLU(), ["RReLU"]),
        (nn.Sequential(nn.Dropout2d(0.5), nn.Sequential(nn.BatchNorm1d(2))), ["BatchNorm1d", "Dropout2d"]),
    ],
)
def test_layers_that_see_more_than_their_sample_are_named(layer, found):
    assert models.batch_dependent(nn.Sequential(nn.Linear(2, 2), layer)) == found


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_a_saved_model_loads_with_weights_only(tmp_path):
    told = config("--job regression")
    model = models.build_model(told)
    checkpoint.save(tmp_path / "m.pt", model, told)
    saved = torch.load(tmp_path / "m.pt", weights_only=True)
    assert set(saved) == {"model", "config"} and set(saved["config"]) == set(FIELDS) and saved["config"]["job"] == "regression"
    again = models.MLP()
    again.load_state_dict(saved["model"])
    assert checkpoint.sha256(again) == checkpoint.sha256(model)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


def test_one_bit_changes_the_fingerprint():
    model = models.build_model(config("--job random"))
    before = checkpoint.sha256(model)
    assert checkpoint.sha256(models.build_model(config("--job random"))) == before
    with torch.no_grad():
        bits = model.classes.weight.view(torch.int32)
        bits[1, 3] ^= 1
        assert checkpoint.sha256(model) != before
        bits[1, 3] ^= 1
    assert checkpoint.sha256(model) == before


def test_buffers_types_and_shapes_count_too():
    model = nn.Sequential(nn.BatchNorm1d(2))
    before = checkpoint.sha256(model)
    model(torch.rand(4, 2))
    assert checkpoint.sha256(model) != before  # running statistics
    weights = torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.bfloat16)
    prints = [checkpoint.sha256(nn.ParameterDict({"w": w})) for w in weights]
    assert len(set(prints)) == 4


# ------------------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("mine", "all_local", "threads"),
    [
        ({0, 1, 2, 3}, [{0, 1, 2, 3}], 4),
        ({0, 1, 2, 3}, [{0, 1, 2, 3}] * 2, 2),
        ({0, 1, 2, 3}, [{0, 1, 2, 3}] * 3, 1),
        ({0, 1}, [{0, 1}] * 5, 1),
        ({0, 1}, [{0, 1}, {2, 3}], 2),  # bound by the launcher: nobody shares
        ([0], [[0], [1], [2]], 1),
        ({0, 1}, [{0, 1}, {0, 1}, {2, 3}, {2, 3}], 1),
        ({4}, [], 1),
    ],
)
def test_threads_are_the_cores_shared_evenly(mine, all_local, threads):
    assert device.share_of_cores(mine, all_local) == threads


def test_usable_cores_are_this_process_s():
    assert device.usable_cores() and len(device.usable_cores()) <= os.cpu_count()


def ranks_beyond_the_gpus():
    """A rank of a node with one rank more than GPUs: refusals are the same with and without CUDA."""
    world = device.visible_gpus() + 1
    return Rank("t", 0, world, 0, world, 0, "127.0.0.1", 1)


@pytest.mark.parametrize("line", ["--backend nccl", "--backend nccl --device cpu", "--device cuda", "--device cuda --backend gloo"])
def test_too_few_gpus_are_refused(line):
    text = refusal(device.choose_device, config(line), ranks_beyond_the_gpus())
    assert ("--backend nccl" if "nccl" in line else "--device cuda") in text and "use --" in text


@pytest.mark.skipif(sys.platform == "darwin", reason="has Apple GPUs")
def test_an_apple_gpu_that_is_not_there_is_refused():
    assert "no Apple GPU" in refusal(device.choose_device, config("--device mps"), Rank("t"))


def test_more_ranks_than_gpus_run_on_the_cpu():
    if sys.platform != "darwin":
        assert device.choose_device(config(), ranks_beyond_the_gpus()) == CPU
    assert device.choose_device(config("--device cpu"), Rank("t")) == CPU


@pytest.mark.parametrize(
    ("line", "kind", "backend"),
    [("", "cpu", "gloo"), ("", "mps", "gloo"), ("", "cuda", "nccl"), ("--backend gloo", "cuda", "gloo")],
)
def test_the_backend_fits_the_device(line, kind, backend):
    assert device.choose_backend(config(line), torch.device(kind)) == backend


@pytest.mark.gpu
def test_a_rank_takes_its_own_gpu():
    assert device.choose_device(config(), Rank("t")) == torch.device("cuda", 0)
    assert "NCCL moves CUDA tensors only" in refusal(device.choose_device, config("--backend nccl --device cpu"), Rank("t"))


def test_peak_memory_is_in_bytes():
    before = device.peak_memory_bytes()
    block = torch.ones(16 << 20, dtype=torch.float32)  # 64 MiB
    assert 30e6 < before < 1e12 and device.peak_memory_bytes() >= before
    assert block.sum() == 16 << 20
    device.wait_for(CPU)
