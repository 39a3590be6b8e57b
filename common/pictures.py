"""Pictures with a class each: MNIST and CIFAR-10, decoded once into bytes, which become normalised batches as they are needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MOVED_BY = 4  # pixels that a training picture is moved by at most, each way; He et al. 2016, arXiv:1512.03385, section 4.2


@dataclass(frozen=True)
class Kind:
    """A set of pictures on the Hugging Face hub."""

    repository: str
    picture: str
    """The column of pictures."""
    label: str
    """The column of classes."""
    shape: tuple[int, int, int]
    """Channels, height, width."""
    mean: tuple[float, ...]
    """Of the training pictures, per channel, pixels from 0 to 1; likewise the deviation."""
    deviation: tuple[float, ...]
    classes: tuple[str, ...]
    moved: bool
    """Whether training pictures are cropped and flipped."""


KINDS = {
    "mnist": Kind("ylecun/mnist", "image", "label", (1, 28, 28), (0.1307,), (0.3081,), tuple("0123456789"), moved=False),
    "cifar10": Kind(
        "uoft-cs/cifar10", "img", "label", (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"), moved=True,
    ),
}  # fmt: skip


class Pictures:
    """Pictures as bytes, in memory that the node's ranks share; a batch is gathered, moved about and normalised."""

    def __init__(
        self,
        kind: Kind,
        pixels: Tensor,
        labels: Tensor,
        seed: int | None,
        dtype: torch.dtype = torch.float32,
        digest: str = "",
    ) -> None:
        """Holds the pictures.

        Args:
            kind: their mean and deviation.
            pixels: uint8, shape (n, channels, height, width); with a seed each in a black frame, 4 pixels wide all around.
            labels: whole numbers, shape (n,).
            seed: of crops and flips; None: as they are.
            dtype: of a batch.
            digest: of the whole set, if it is known.
        """
        self.kind, self.pixels, self.labels, self.seed, self.dtype, self.digest = kind, pixels, labels.long(), seed, dtype, digest
        shape, device = (1, -1, 1, 1), pixels.device
        self._mean = torch.tensor(kind.mean, dtype=dtype, device=device).view(shape) * 255
        self._deviation = torch.tensor(kind.deviation, dtype=dtype, device=device).view(shape) * 255
        self._moves: tuple[Tensor, Tensor] | None = None
        self.set_epoch(0)

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One picture and its class."""
        x, y = self.__getitems__(torch.tensor([index]))
        return x[0], y[0]

    def __getitems__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of ``indices`` (int64, shape (n,)): pictures of ``dtype`` with mean 0 and deviation 1, classes int64."""
        if self._moves is None:
            x = self.pixels.index_select(0, indices)  # whole pictures; with [indices] it goes byte by byte, five times as long
        else:
            begins, flipped = (move[indices] for move in self._moves)
            x = moved(self.pixels, begins, flipped)
        return x.to(self.dtype).sub_(self._mean).div_(self._deviation), self.labels[indices]

    def set_epoch(self, epoch: int) -> None:
        """Draws each picture's crop and flip for this epoch: by seed, epoch and the picture's index, whoever trains on it."""
        if self.seed is not None:
            random = np.random.default_rng([self.seed, epoch, 1])  # not the shuffle's numbers
            down, right = random.integers(0, 2 * MOVED_BY + 1, (2, len(self)), dtype=np.int64)
            flipped = random.integers(0, 2, len(self), dtype=np.int8).astype(bool)
            device = self.pixels.device
            picture, _, row, _ = self.pixels.stride()
            begins = np.arange(len(self), dtype=np.int64) * picture + down * row + right
            self._moves = torch.from_numpy(begins).to(device), torch.from_numpy(flipped).to(device)

    def to(self, device: torch.device, dtype: torch.dtype) -> Pictures:
        """The same pictures, as bytes still, on ``device``; batches as ``dtype``."""
        return Pictures(self.kind, self.pixels.to(device), self.labels.to(device), self.seed, dtype, self.digest)


def moved(framed: Tensor, begins: Tensor, flipped: Tensor) -> Tensor:
    """Pictures cut out of their black frames, mirrored where ``flipped``.

    Args:
        framed: shape (…, channels, height + 8, width + 8).
        begins: int64, shape (n,): where each window's first pixel is, counted from the very first pixel of ``framed``.
        flipped: bool, shape (n,).

    Returns:
        Shape (n, channels, height, width).
    """
    count, channels, height, width = framed.shape
    strides, around = framed.stride(), 2 * MOVED_BY
    # All windows, wherever they begin, nothing copied yet; then a block a picture. unfold and where take twice as long.
    last = (count - 1) * strides[0] + around * (strides[2] + 1)
    windows = framed.as_strided((last + 1, channels, height - around, width - around), (1, *strides[1:]))
    x = windows.index_select(0, begins)
    mirrored = flipped.nonzero().flatten()
    return x.index_copy_(0, mirrored, x.index_select(0, mirrored).flip(3))
