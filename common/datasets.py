"""The data sets. Each is made alike on every rank: what is generated depends on ``--seed`` only."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from common import pictures, text
from common.config import TrainConfig
from common.errors import UsageError, one_line
from common.parts import accepted, build, load_class
from common.sampling import part_of

DIGITS_MEAN, DIGITS_STD = 0.305, 0.325  # of all pixels, scaled to 0..1
SPLIT_SEED = 0  # of the 80/20 split; fixed, so that every run is evaluated on the same samples


class Dataset(Protocol):
    """What ``--dataset package.module:Name`` must offer."""

    def __len__(self) -> int:
        """The number of samples."""
        ...

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Sample ``index`` as (x, y)."""
        ...


class Tensors:
    """Samples held in two tensors, so that a batch is one indexing call."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Holds ``x``, shape (samples, …), and ``y``, shape (samples, …)."""
        self.x, self.y = x, y

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One sample."""
        return self.x[index], self.y[index]

    def __getitems__(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of ``indices`` (int64, shape (n,)), gathered at once."""
        return self.x[indices], self.y[indices]

    def to(self, device: torch.device, dtype: torch.dtype) -> Tensors:
        """The same samples on ``device``, with floats as ``dtype``."""
        parts = (t.to(device, dtype if t.is_floating_point() else None) for t in (self.x, self.y))
        return Tensors(*parts)


BuiltIn = Tensors | pictures.Pictures | text.Windows


@functools.cache  # a fork server loads them for its ranks
def digits() -> tuple[Tensors, Tensors]:
    """1,437 training and 360 test digits: float32 (n, 1, 28, 28) with mean 0 and deviation 1, labels int64 (n,).

    Source: common/data/DIGITS.md.
    """
    with np.load(Path(__file__).parent / "data" / "digits.npz") as file:
        images, labels = file["images"], file["labels"]
    x = torch.from_numpy(images).float().div_(16).unsqueeze(1)
    x = F.interpolate(x, size=(28, 28), mode="bilinear", align_corners=False).sub_(DIGITS_MEAN).div_(DIGITS_STD)
    return split(Tensors(x, torch.from_numpy(labels).long()))


def split(data: Tensors) -> tuple[Tensors, Tensors]:
    """80 % to train on and 20 % to evaluate, by a fixed shuffle."""
    order = torch.from_numpy(_split_order(len(data)))
    cut = len(data) * 4 // 5
    return Tensors(*data.__getitems__(order[:cut])), Tensors(*data.__getitems__(order[cut:]))


def _split_order(length: int) -> Any:
    return np.random.default_rng(SPLIT_SEED).permutation(length)


def random(data_size: int, input_size: int, seed: int) -> tuple[Tensors, Tensors]:
    """Normal inputs float32 (n, input_size), coin-flip labels int64 (n,): nothing to learn; a quarter more to evaluate."""
    generator = torch.Generator().manual_seed(seed)

    def part(n: int) -> Tensors:
        return Tensors(torch.randn(n, input_size, generator=generator), torch.randint(2, (n,), generator=generator))

    return part(data_size), part(max(1, data_size // 4))


def regression(data_size: int, seed: int) -> tuple[Tensors, Tensors]:
    """A noisy curve y = sin(3x) + x/2 + noise (σ = 0.1), x uniform in [-2, 2]; float32 (n, 1) both; a quarter more to evaluate."""
    generator = torch.Generator().manual_seed(seed)

    def part(n: int) -> Tensors:
        x = torch.rand(n, 1, generator=generator) * 4 - 2
        return Tensors(x, torch.sin(3 * x) + x / 2 + 0.1 * torch.randn(n, 1, generator=generator))

    return part(data_size), part(max(1, data_size // 4))


class Subset:
    """Some samples of a data set of the user's own."""

    def __init__(self, data: Dataset, indices: Sequence[int]) -> None:
        """The samples ``indices`` of ``data``."""
        self.data, self.indices = data, indices

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """One sample."""
        return self.data[self.indices[index]]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """The samples ``indices``, gathered at once where the data set can."""
        chosen = [self.indices[i] for i in indices]
        gather = getattr(self.data, "__getitems__", None)
        return gather(chosen) if gather else [self.data[i] for i in chosen]


def custom(config: TrainConfig) -> tuple[Dataset, Dataset]:
    """Train and eval parts of the class that ``--dataset`` names.

    A class with a parameter ``train`` (torchvision's habit) is made twice; any other is split 80/20 by a fixed shuffle.

    Raises:
        UsageError: it cannot be imported or made, or is no data set of (x, y) pairs.
    """
    flag, path = "--dataset", config.dataset
    made = load_class(flag, path)
    offered = {"input_size": config.input_size, "data_size": config.data_size, "seed": config.seed}
    if "train" in accepted(made, {"train": True}):
        parts: tuple[Dataset, ...] = tuple(build(flag, path, made, offered | {"train": t}) for t in (True, False))
        for part in parts:
            _check(path, part)
    else:
        whole = build(flag, path, made, offered)
        _check(path, whole)
        order, cut = _split_order(len(whole)).tolist(), len(whole) * 4 // 5
        parts = (Subset(whole, order[:cut]), Subset(whole, order[cut:]))
    if not len(parts[0]) or not len(parts[1]):
        raise UsageError(f"--dataset {path}: no samples to train on or to evaluate; give a data set of 5 samples or more")
    return parts[0], parts[1]


def _check(path: str, data: Any) -> None:
    try:
        length = len(data)
        if length:
            _, _ = data[0]
            fetch(data, torch.arange(1), torch.device("cpu"), torch.float32)
    except Exception as error:
        raise UsageError(
            f"--dataset {path}: does not fit ({one_line(error)}); it needs __len__, and __getitem__(index) that returns (x, y), "
            "each a tensor, an array or a number"
        ) from None
    if length < 1:
        raise UsageError(f"--dataset {path}: is empty")


GENERATED = ("digits", "random", "regression")  # alike on every rank by themselves
FROM_FILES = ("mnist", "cifar10", "text")  # which one rank of a node makes ready for all


def facts(train: Dataset, evaluation: Dataset) -> dict[str, Any]:
    """What must be the same on all ranks, or they would wait for each other's steps, or train on other samples."""
    digest = train.digest if isinstance(train, pictures.Pictures | text.Windows) else None
    return {"training samples": len(train), "evaluation samples": len(evaluation), "data of digest": digest}


def load_datasets(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, say: Callable[[str], None] = print
) -> tuple[Dataset, Dataset]:
    """(train, eval) data, with built-in ones on ``device`` as ``dtype``; ``say`` is told what takes time.

    Raises:
        UsageError: the data are not there, or not what they should be.
    """
    parts: tuple[BuiltIn, BuiltIn]
    if config.dataset == "digits":
        parts = digits()
    elif config.dataset in pictures.KINDS:
        parts = _pictures(config, say)
    elif config.dataset == "text":
        parts = text.windows(config.data_dir, config.cache_dir, config.context, config.data_size, say)
    elif config.dataset == "random":
        parts = random(config.data_size, config.input_size, config.seed)
    elif config.dataset == "regression":
        parts = regression(config.data_size, config.seed)
    else:
        return custom(config)
    return parts[0].to(device, dtype), parts[1].to(device, dtype)


def _pictures(config: TrainConfig, say: Callable[[str], None]) -> tuple[pictures.Pictures, pictures.Pictures]:
    from common import hub

    kind = pictures.KINDS[config.dataset]
    kept = hub.arrays(config.dataset, kind, config.data_dir, config.cache_dir, say)
    found = {name: torch.from_numpy(array) for name, array in kept.arrays.items()}
    seed = config.seed if kind.moved else None
    return (
        pictures.Pictures(kind, found["train_pixels"], found["train_labels"], seed, digest=kept.digest),
        pictures.Pictures(kind, found["test_pixels"], found["test_labels"], None),
    )


def fetch(data: Dataset, indices: torch.Tensor, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of ``indices`` on ``device``, floats as ``dtype``: in one call where the data set can (``__getitems__``)."""
    if isinstance(data, BuiltIn):
        return data.__getitems__(indices if device.type == "cpu" else indices.to(device))
    if hasattr(data, "__getitems__"):
        batch = data.__getitems__(indices.tolist())
        x, y = batch if isinstance(batch, tuple) else torch.utils.data.default_collate(batch)
    else:
        x, y = torch.utils.data.default_collate([data[i] for i in indices.tolist()])
    x, y = (t.to(device, dtype if t.is_floating_point() else None) for t in (x, y))
    return x, y


def eval_share(length: int, world_size: int, rank: int) -> slice:
    """The part of the evaluation data that ``rank`` looks at; together the ranks see each sample once."""
    return part_of(length, world_size, rank)
