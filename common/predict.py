"""What a saved model makes of a picture or a text: ``python -m common.predict cifar_net.pth --image cat.png``.

python -m common.predict cifar_net.pth --index 7            a picture of the data that it was evaluated on
python -m common.predict text.pth --prompt "def "           a text model goes on
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common import checkpoint, datasets, models
from common.command_line import Parser, underscored
from common.config import TrainConfig
from common.console import table
from common.errors import UsageError, exit_status, one_line
from common.gpt import GPT
from common.pictures import KINDS, Kind
from common.values import not_negative, whole

DIGITS = Kind("", "", "", (1, 28, 28), (datasets.DIGITS_MEAN,), (datasets.DIGITS_STD,), tuple("0123456789"), moved=False)
DARK = 0.5  # mean brightness below which a grey picture is light ink on dark ground, as the training pictures are


def main(argv: Sequence[str] | None = None) -> None:
    """Loads the model, and shows what it says."""
    given = _arguments(sys.argv[1:] if argv is None else argv)
    state, saved = checkpoint.load(given.file, given.file)
    config = _config(saved, given)
    model = models.build_model(config)
    checkpoint.take_over(given.file, state, saved, model)
    model.eval()
    if isinstance(model, GPT):
        _write(model, given)
    else:
        _classify(model, config, given)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    p = Parser(
        prog="python -m common.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("file", metavar="FILE", help="a saved model (--save)")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--image", metavar="FILE", help="classify this picture, scaled to the model's size")
    what.add_argument("--index", metavar="I", help="classify picture I of the evaluation data (default: 0)")
    what.add_argument("--prompt", metavar="TEXT", help="write on after this text (default: 'def ')")
    p.add_argument("--length", metavar="N", default="200", help="bytes to write (default: 200)")
    p.add_argument("--temperature", metavar="X", default="0.8", help="0: always the likeliest byte (default: 0.8)")
    p.add_argument("--seed", metavar="N", default="0", help="of the choice among likely bytes (default: 0)")
    p.add_argument("--data_dir", metavar="DIR", help="where the evaluation data are (default: where the model's were)")
    given = p.parse_args(underscored(argv))
    for name, convert in (("index", whole(0)), ("length", whole(1)), ("temperature", not_negative), ("seed", whole(0, 2**31 - 1))):
        text = getattr(given, name)
        try:
            setattr(given, name, None if text is None else convert(text))
        except ValueError as allowed:
            raise UsageError(f"--{name} {text}: not allowed; give {allowed}") from None
    return given


def _config(saved: dict[str, Any], given: argparse.Namespace) -> TrainConfig:
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    config = TrainConfig(**{name: value for name, value in saved.items() if name in known})
    return dataclasses.replace(config, data_dir=given.data_dir or config.data_dir)


def _write(model: GPT, given: argparse.Namespace) -> None:
    if given.image is not None or given.index is not None:
        raise UsageError(f"{given.file}: a text model, which takes a --prompt and no picture")
    prompt = ("def " if given.prompt is None else given.prompt).encode() or b"\n"
    generator = torch.Generator().manual_seed(given.seed)
    written = model.write(prompt, given.length, given.temperature, generator)
    sys.stdout.write((prompt + written).decode(errors="replace") + "\n")


def _classify(model: torch.nn.Module, config: TrainConfig, given: argparse.Namespace) -> None:
    if given.prompt is not None:
        raise UsageError(f"{given.file}: --model {config.model} classifies; it takes --image or --index and no --prompt")
    kind = {**KINDS, "digits": DIGITS}.get(config.dataset)
    known: tuple[str, ...] = ()
    if given.image is not None:
        if kind is None:
            raise UsageError(f"--image {given.image}: --dataset {config.dataset} has no pictures; give --index")
        x, truth, name = picture(given.image, kind), None, given.image
    else:
        x, truth, name, known = _sample(config, given.index or 0)
    with torch.no_grad():
        output = model(x)
    logits = output["logits"] if isinstance(output, dict) else output
    if logits.ndim != 2 or (truth is not None and truth.is_floating_point()):
        print(f"{name}: {logits.flatten().tolist()}" + ("" if truth is None else f" (in the data: {truth.flatten().tolist()})"))
        return
    classes = kind.classes if kind else known or tuple(map(str, range(logits.shape[1])))
    chances = logits.float().softmax(1)[0]
    order = chances.argsort(descending=True).tolist()
    really = "" if truth is None else f" (it is {classes[int(truth)]})"
    print(f"{name}: {classes[order[0]]}{really}")
    print(table(["class", "probability"], [[classes[k], f"{100 * chances[k]:6.2f} %"] for k in order], indent=2))


def _sample(config: TrainConfig, index: int) -> tuple[Tensor, Tensor, str, tuple[str, ...]]:
    _, data = datasets.load_datasets(config, torch.device("cpu"), torch.float32)
    if index >= len(data):
        raise UsageError(f"--index {index}: the evaluation data have {len(data)} samples; give 0 to {len(data) - 1}")
    x, y = datasets.fetch(data, torch.tensor([index]), torch.device("cpu"), torch.float32)
    whole = data.data if isinstance(data, datasets.Subset) else data
    classes = tuple(getattr(whole, "classes", ()))  # as torchvision's data sets have
    return x, y[0], f"{config.dataset}, evaluation sample {index}", classes


def picture(path: str, kind: Kind) -> Tensor:
    """The picture in the file ``path`` as ``kind``'s are: float32 (1, channels, height, width), normalised.

    Raises:
        UsageError: it cannot be read as a picture.
    """
    import numpy as np
    from PIL import Image

    channels, height, width = kind.shape
    try:
        with Image.open(path) as opened:
            scaled = opened.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
    except (OSError, ValueError) as error:
        raise UsageError(f"--image {path}: cannot be read as a picture ({one_line(error, 100)})") from None
    pixels = torch.from_numpy(np.array(scaled, dtype=np.float32) / 255).view(1, height, width, channels).permute(0, 3, 1, 2)
    if channels == 1 and pixels.mean() > DARK:  # ink on paper
        pixels = 1 - pixels
    shape = (1, -1, 1, 1)
    return (pixels - torch.tensor(kind.mean).view(shape)) / torch.tensor(kind.deviation).view(shape)


if __name__ == "__main__":
    sys.exit(exit_status(main))
