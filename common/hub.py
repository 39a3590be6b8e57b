"""MNIST and CIFAR-10 from the Hugging Face hub, or from the same parquet files on disk (``--data_dir``), decoded once."""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from common import cache
from common.errors import UsageError, one_line
from common.pictures import MOVED_BY, Kind

SPLITS = ("train", "test")


def arrays(name: str, kind: Kind, data_dir: str | None, cache_dir: str, say: Callable[[str], None]) -> cache.Kept:
    """{"train_pixels": uint8 (n, channels, height, width), "train_labels": uint8 (n,), "test_pixels", "test_labels"}.

    Training pictures that are moved about (``kind.moved``) have a black frame, 4 pixels wide all around.

    Args:
        name: the data set's.
        kind: what it is.
        data_dir: a folder with the hub's files, ``train-*.parquet`` and ``test-*.parquet``, at any depth; None: from the hub.
        cache_dir: where they are kept when decoded.
        say: is told what takes time.

    Raises:
        UsageError: there are no such files, they hold something else, the hub is not reached, or a package is missing.
    """
    files = _files(name, kind, data_dir) if data_dir else None
    found = cache.key(name, [f for split in SPLITS for f in files[split]] if files else [])
    return cache.kept(Path(cache_dir) / found, lambda part: _decode(name, kind, files, part, say))


def _files(name: str, kind: Kind, data_dir: str) -> dict[str, list[Path]]:
    files = {split: sorted(Path(data_dir).glob(f"**/{split}-*.parquet")) for split in SPLITS}
    if missing := [f"{split}-*.parquet" for split in SPLITS if not files[split]]:
        raise UsageError(
            f"--data_dir {data_dir}: there is no {' and no '.join(missing)} in it; --job {name} reads the "
            f"files of huggingface.co/datasets/{kind.repository}"
        )
    return files


def _decode(name: str, kind: Kind, files: dict[str, list[Path]] | None, part: Path, say: Callable[[str], None]) -> None:
    try:
        import datasets
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--job {name}: {error.name} is missing, with which the files are read: pip install -e '.[hf]', in this folder"
        ) from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    source = str(files["train"][0].parent) if files else kind.repository
    with tempfile.TemporaryDirectory(dir=part.parent, prefix=".parquet-") as temporary:
        try:
            if files:
                paths = {split: [str(file) for file in files[split]] for split in SPLITS}
                tables = datasets.load_dataset("parquet", data_files=paths, cache_dir=temporary)
            else:
                say(f"Fetching {kind.repository} from the Hugging Face hub")
                tables = datasets.load_dataset(kind.repository)
        except Exception as error:  # the library's own, httpx's, the system's: all mean that there is nothing to train on
            if files:
                raise UsageError(f"--data_dir {source}: cannot be read as parquet ({one_line(error, 150)})") from None
            raise UsageError(
                f"--job {name}: {kind.repository} cannot be fetched ({one_line(error, 150)}); on a machine that reaches "
                f"huggingface.co: hf download {kind.repository} --repo-type dataset --local-dir DIR, then here --data_dir DIR"
            ) from None
        for split in SPLITS:
            _decode_split(kind, source, split, tables[split], part)
            say(f"Decoded {len(tables[split]):,} {split} pictures of {name}, once for all ranks and runs, into {part.parent}")


def _decode_split(kind: Kind, source: str, split: str, table: Any, part: Path) -> None:
    import datasets
    from PIL import Image

    missing = {kind.picture, kind.label} - set(table.column_names)
    if missing:
        raise UsageError(f"{source}: the {split} part has no column {' and no '.join(sorted(missing))}; is it another data set?")
    channels, height, width = kind.shape
    frame = MOVED_BY if kind.moved and split == "train" else 0  # so that a moved picture is read in one piece
    shape = (len(table), channels, height + 2 * frame, width + 2 * frame)
    pixels = open_memmap(part / f"{split}_pixels.npy", "w+", np.uint8, shape)
    inside = pixels[:, :, frame : frame + height, frame : frame + width]
    labels = np.zeros(len(table), np.uint8)
    number = 0
    table = table.cast_column(kind.picture, datasets.Image(decode=False))
    for batch in table.iter(batch_size=1000):
        for cell, label in zip(batch[kind.picture], batch[kind.label], strict=True):
            try:
                picture = Image.open(io.BytesIO(cell["bytes"]))
            except (OSError, TypeError) as error:
                raise UsageError(f"{source}: {split} picture {number} cannot be read ({one_line(error, 100)})") from None
            if picture.size != (width, height) or not 0 <= label < len(kind.classes):
                raise UsageError(
                    f"{source}: {split} picture {number} has {picture.width}×{picture.height} pixels and class {label}, not "
                    f"{width}×{height} and 0 to {len(kind.classes) - 1}; is it another data set?"
                )
            decoded = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
            inside[number] = decoded.reshape(height, width, channels).transpose(2, 0, 1)
            labels[number] = label
            number += 1
    pixels.flush()
    cache.write(part, {f"{split}_labels": labels})
