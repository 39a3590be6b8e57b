"""predict.py and checkpoint.py's reading: a saved model says what it sees, goes on writing, and is trained on."""

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from common import checkpoint, models, predict
from common.pictures import KINDS
from tests.common import hub_files
from tests.common.helpers import ROOT, refusal, run


def config(line=""):
    from common.command_line import parse_config

    return parse_config("plain.py", argv=line.split(), environment={})


def saved(path, line):
    asked = config(line)
    model = models.build_model(asked)
    checkpoint.save(path, model, asked)
    return model.eval()


def shown(capsys, *words):
    predict.main([str(word) for word in words])
    return capsys.readouterr().out


def test_a_picture_of_the_evaluation_data(tmp_path, capsys):
    content = hub_files.write(tmp_path / "data", "cifar10")
    line = f"--job cifar10 --data_dir {tmp_path / 'data'} --cache_dir {tmp_path / 'kept'}"
    model = saved(tmp_path / "net.pth", line)
    shown(capsys, tmp_path / "net.pth")  # decodes
    out = shown(capsys, tmp_path / "net.pth", "--index", 3)
    pixels, labels = content["test"]
    x = torch.from_numpy(pixels[3].transpose(2, 0, 1) / 255).float().unsqueeze(0)
    kind = KINDS["cifar10"]
    x = (x - torch.tensor(kind.mean).view(1, 3, 1, 1)) / torch.tensor(kind.deviation).view(1, 3, 1, 1)
    chances = model(x)["logits"].softmax(1)[0]
    best = kind.classes[int(chances.argmax())]
    assert out.startswith(f"cifar10, evaluation sample 3: {best} (it is {kind.classes[labels[3]]})\n")
    rows = re.findall(r"^  (\w+) +([\d.]+) %$", out, re.MULTILINE)
    assert len(rows) == 10 and rows[0] == (best, f"{100 * chances.max():.2f}")
    assert [float(p) for _, p in rows] == sorted((float(p) for _, p in rows), reverse=True)


def test_a_picture_from_a_file_is_scaled_and_ink_on_paper_turned_round(tmp_path, capsys):
    model = saved(tmp_path / "cnn.pth", "--job mnist")
    ink = np.full((56, 56), 255, np.uint8)
    ink[10:46, 24:32] = 0  # a one
    Image.fromarray(ink).save(tmp_path / "paper.png")
    Image.fromarray(255 - ink).save(tmp_path / "screen.png")
    paper, screen = (predict.picture(str(tmp_path / f"{name}.png"), KINDS["mnist"]) for name in ("paper", "screen"))
    assert paper.shape == (1, 1, 28, 28) and torch.allclose(paper, screen, atol=1e-5)
    assert screen[0, 0, 14, 14].item() == pytest.approx((1 - 0.1307) / 0.3081, abs=1e-4)
    out = shown(capsys, tmp_path / "cnn.pth", "--image", tmp_path / "paper.png")
    assert out.startswith(f"{tmp_path / 'paper.png'}: {int(model(paper)['logits'].argmax())}\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--job regression", r"regression, evaluation sample 2: \[-?[\d.]+\] \(in the data: \[-?[\d.]+\]\)\n"),
        ("--job random", r"random, evaluation sample 2: [01] \(it is [01]\)\n"),
        ("--job digits --precision fp64", r"digits, evaluation sample 2: \d \(it is \d\)\n"),
    ],
)
def test_other_jobs_have_samples_too(tmp_path, capsys, line, said):
    saved(tmp_path / "a.pth", line)
    assert re.match(said, shown(capsys, tmp_path / "a.pth", "--index", 2))


def test_a_text_goes_on(tmp_path, capsys):
    model = saved(tmp_path / "text.pth", "--job text --layers 1 --heads 1 --width 8 --context 16")
    out = shown(capsys, tmp_path / "text.pth", "--prompt", "import ", "--length", 20, "--seed", 3)
    wanted = model.write(b"import ", 20, 0.8, torch.Generator().manual_seed(3))
    assert out == (b"import " + wanted).decode(errors="replace") + "\n"


@pytest.mark.launch
def test_as_a_user_types_it(tmp_path):
    saved(tmp_path / "text.pth", "--job text --layers 1 --heads 1 --width 8 --context 16")
    words = [sys.executable, "-m", "common.predict", str(tmp_path / "text.pth"), "--length", "5"]
    status, out, err = run(words, cwd=ROOT)
    assert (status, err) == (0, "") and out.startswith("def ")
    status, out, err = run([*words[:3], str(tmp_path / "none.pth")], cwd=ROOT)
    assert (status, out) == (2, "") and err.count("\n") == 1 and "cannot be read (No such file or directory)" in err
    assert "--index" in run([*words[:3], "--help"], cwd=ROOT)[1]


def test_what_cannot_be_shown(tmp_path):
    saved(tmp_path / "text.pth", "--job text --layers 1 --heads 1 --width 8 --context 16")
    saved(tmp_path / "cnn.pth", "--job digits")
    saved(tmp_path / "mlp.pth", "--job regression")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    for words, said in (
        (("text.pth", "--index", "1"), "a text model, which takes a --prompt"),
        (("cnn.pth", "--prompt", "x"), "it takes --image or --index"),
        (("cnn.pth", "--image", str(tmp_path / "broken.png")), "cannot be read as a picture"),
        (("cnn.pth", "--index", "360"), "have 360 samples; give 0 to 359"),
        (("cnn.pth", "--index", "x"), "--index x: not allowed"),
        (("mlp.pth", "--image", "a.png"), "--dataset regression has no pictures"),
        (("broken.png",), "holds no saved model"),
    ):
        assert said in refusal(predict.main, [str(tmp_path / words[0]), *words[1:]])


def test_a_file_that_is_no_saved_model(tmp_path):
    torch.save({"weights": 1}, tmp_path / "a.pth")
    assert "holds no model and config" in refusal(checkpoint.load, "--resume a.pth", tmp_path / "a.pth")
    torch.save(print, tmp_path / "b.pth")  # code, which is not run
    assert "holds no saved model" in refusal(checkpoint.load, "--resume b.pth", tmp_path / "b.pth")


def test_weights_of_another_model(tmp_path):
    saved(tmp_path / "a.pth", "--job regression")
    content = checkpoint.load("", tmp_path / "a.pth")
    said = refusal(checkpoint.take_over, "--resume a.pth", *content, models.build_model(config("--job digits")))
    assert "another model's weights: layers.0.weight is 64×1 there and missing here; it was trained with --model mlp" in said


def test_weights_are_taken_over_to_the_bit(tmp_path):
    model = saved(tmp_path / "a.pth", "--job digits --seed 5")
    other = models.build_model(config("--job digits"))
    assert checkpoint.sha256(other) != checkpoint.sha256(model)
    state, told = checkpoint.load("--resume a.pth", tmp_path / "a.pth")
    checkpoint.take_over("--resume a.pth", state, told, other)
    assert checkpoint.sha256(other) == checkpoint.sha256(model) and told["seed"] == 5
