"""Small data sets in the hub's own schema, written by the library that writes those on the hub."""

import io

import numpy as np
from PIL import Image

COLUMNS = {"mnist": ("image", "label", (28, 28)), "cifar10": ("img", "label", (32, 32, 3))}
FOLDERS = {"mnist": "mnist", "cifar10": "plain_text"}  # where the hub's repositories have them
CLASSES = {
    "mnist": list("0123456789"),
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
}


def pictures(name, n, seed):
    """Pictures that can be told apart, and learnt: a bright square whose place tells the class."""
    random = np.random.default_rng(seed)
    shape = COLUMNS[name][2]
    pixels = random.integers(0, 80, (n, *shape), dtype=np.uint8)
    labels = random.integers(0, 10, n)
    for picture, label in zip(pixels, labels, strict=True):
        row, column = divmod(int(label), 4)
        picture[8 * row : 8 * row + 7, 7 * column : 7 * column + 6] += 150
    return pixels, labels.tolist()


def png(pixels):
    """A cell of an image column."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def write(folder, name, train=200, test=50, seed=0, **columns):
    """Writes train and test parquet files below ``folder``; returns what is in them, as {split: (pixels, labels)}."""
    import datasets

    datasets.disable_progress_bars()
    picture, label, _ = COLUMNS[name]
    picture, label = columns.get("picture", picture), columns.get("label", label)
    features = datasets.Features({picture: datasets.Image(), label: datasets.ClassLabel(names=CLASSES[name])})
    where = folder / FOLDERS[name]
    where.mkdir(parents=True, exist_ok=True)
    content = {}
    for number, (split, n) in enumerate({"train": train, "test": test}.items()):
        pixels, labels = content[split] = pictures(name, n, seed + number)
        table = datasets.Dataset.from_dict({picture: [png(p) for p in pixels], label: labels}, features=features)
        table.to_parquet(where / f"{split}-00000-of-00001.parquet")
    return content
