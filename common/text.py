"""Text as bytes: windows of ``--context`` of them, each to predict the next byte at every place."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import cache
from common.errors import UsageError

EVAL_PART = 10  # the last tenth of the text is for evaluation
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Windows:
    """Pieces of a text that do not overlap, spread evenly over it."""

    def __init__(self, text: Tensor, context: int, most: int, digest: str = "") -> None:
        """``most`` samples of ``context`` bytes from ``text`` (uint8, shape (bytes,)), or as many as there are."""
        self.text, self.context, self.digest = text, context, digest
        there = (len(text) - 1) // context
        self.starts = (torch.arange(min(most, there), device=text.device) * there // max(1, min(most, there))) * context
        self._offsets = torch.arange(context + 1, device=text.device)

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One sample."""
        x, y = self.__getitems__(torch.tensor([index]))
        return x[0], y[0]

    def __getitems__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of ``indices``: bytes and the bytes that follow them, int64 (n, context) both."""
        window = self.text[self.starts[indices].unsqueeze(1) + self._offsets].long()
        return window[:, :-1], window[:, 1:]

    def to(self, device: torch.device, dtype: torch.dtype) -> Windows:
        """The same on ``device``; bytes stay whole numbers."""
        return Windows(self.text.to(device), self.context, len(self), self.digest)


def windows(
    data_dir: str | None, cache_dir: str, context: int, data_size: int, say: Callable[[str], None]
) -> tuple[Windows, Windows]:
    """(train, eval) windows of the text in ``data_dir`` (a file or folder); by default of Python's standard library.

    Raises:
        UsageError: there is no text, or less than ten windows of it.
    """
    files = _files(data_dir)
    where = Path(cache_dir) / cache.key("text", files)
    kept = cache.kept(where, lambda part: _join(files, data_dir, part, say))
    text = torch.from_numpy(kept.arrays["text"])
    cut = len(text) - len(text) // EVAL_PART
    if (len(text) - cut) <= context:
        needed = (context + 1) * EVAL_PART
        raise UsageError(f"--data_dir {data_dir}: {len(text):,} bytes are too few for --context {context}; it takes {needed:,}")
    return Windows(text[:cut], context, data_size, kept.digest), Windows(text[cut:], context, max(1, data_size // 4))


def _files(data_dir: str | None) -> list[Path]:
    if data_dir is None:
        import sysconfig  # not above: every launch would pay for it

        library = Path(sysconfig.get_path("stdlib"))
        found = []
        for folder, below, names in os.walk(library):
            below[:] = set(below) - _LEFT_OUT  # not looked into: site-packages may hold ten times as many files
            found += [Path(folder, name) for name in names if name.endswith(".py")]
        return sorted(found, key=lambda p: p.relative_to(library).parts)
    path = Path(data_dir)
    if path.is_file():
        return [path]
    found = [p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if not found:
        raise UsageError(f"--data_dir {data_dir}: no such file or folder, or no file in it; give a text or a folder of texts")
    return sorted(found, key=lambda p: p.relative_to(path).parts)


def _join(files: list[Path], data_dir: str | None, part: Path, say: Callable[[str], None]) -> None:
    texts, binary = [], 0
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UsageError(f"{file}: cannot be read ({error.strerror})") from None
        if b"\0" in content:  # a picture, an archive
            binary += 1
        elif content:
            texts.append(content)
    joined = b"\n".join(texts)
    cache.write(part, {"text": np.frombuffer(joined, np.uint8)})
    source = data_dir or f"the standard library of Python {platform.python_version()}"
    left = f" ({binary} binary files left out)" if binary else ""
    say(f"Text: {len(joined):,} bytes of {len(texts):,} files of {source}{left}")
