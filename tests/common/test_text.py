"""text.py, gpt.py, optimizers.py: the text job's data, model and steps."""

import math
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn

from common import models, optimizers, text
from common.gpt import GPT, flops_per_token
from common.precision import Precision
from tests.common.helpers import refusal

CPU = torch.device("cpu")


def config(line=""):
    from common.command_line import parse_config

    return parse_config("plain.py", argv=line.split(), environment={})


# -------------------------------------------------------------------------------------------------------------- text


def windows(tmp_path, content, context=8, most=10_000):
    file = tmp_path / "book.txt"
    file.write_bytes(content)
    return text.windows(str(file), str(tmp_path / "kept"), context, most, lambda said: None)


def test_each_byte_is_to_be_predicted_from_those_before_it(tmp_path):
    content = bytes(range(256)) + bytes(range(255, -1, -1))
    content = content.replace(b"\0", b"\1")
    train, evaluation = windows(tmp_path, content)
    cut = len(content) - len(content) // 10
    assert len(train) == (cut - 1) // 8 and len(evaluation) == (len(content) - cut - 1) // 8
    x, y = train.__getitems__(torch.tensor([2, 0]))
    assert x.dtype == y.dtype == torch.int64
    assert bytes(x[0].tolist()) == content[16:24] and bytes(y[0].tolist()) == content[17:25]
    assert bytes(x[1].tolist()) == content[0:8] and bytes(y[1].tolist()) == content[1:9]
    assert bytes(evaluation[0][0].tolist()) == content[cut : cut + 8]
    seen = torch.cat([train[k][0] for k in range(len(train))])
    assert bytes(seen.tolist()) == content[: len(train) * 8], "nothing twice, nothing left out"


def test_fewer_samples_are_spread_over_the_text(tmp_path):
    train, evaluation = windows(tmp_path, b"x" * 8001, most=100)
    assert len(train) == 100 and len(evaluation) == 25
    assert train.starts[0] == 0 and train.starts[-1] > 7000 and (train.starts.diff() >= 8).all() and (train.starts % 8 == 0).all()


def test_a_folder_of_texts_without_what_is_none(tmp_path):
    folder = tmp_path / "books"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_text("first " * 50)
    (folder / "b" / "c.txt").write_text("second " * 50)
    (folder / "z.png").write_bytes(b"\x89PNG\0\0" * 100)
    (folder / ".hidden").write_text("hidden " * 50)
    said = []
    train, evaluation = text.windows(str(folder), str(tmp_path / "kept"), 8, 10_000, said.append)
    assert bytes(train.text.tolist() + evaluation.text.tolist()) == b"first " * 50 + b"\n" + b"second " * 50
    assert said == [f"Text: 651 bytes of 2 files of {folder} (1 binary files left out)"]


def test_by_default_it_is_the_standard_library(tmp_path):
    said = []
    train, _ = text.windows(None, str(tmp_path / "kept"), 128, 100, said.append)
    begins = bytes(train.text[:200].tolist())
    first = sorted(p for p in Path(sysconfig.get_path("stdlib")).glob("*.py"))[0]
    assert begins == first.read_bytes()[:200] and len(train.text) > 3_000_000
    assert "standard library of Python" in said[0]
    assert text.windows(None, str(tmp_path / "kept"), 128, 100, said.append) and len(said) == 1


def test_no_text_or_too_little(tmp_path):
    assert "no such file or folder" in refusal(text.windows, str(tmp_path / "none"), str(tmp_path), 8, 10, print)
    assert "100 bytes are too few for --context 16; it takes 170" in refusal(windows, tmp_path, b"x" * 100, 16)


# --------------------------------------------------------------------------------------------------------------- gpt


def gpt(**sizes):
    torch.manual_seed(0)
    return GPT(**{"layers": 2, "heads": 2, "width": 16, "context": 12} | sizes)


def test_a_byte_does_not_see_those_after_it():
    model, x = gpt(), torch.randint(256, (2, 12))
    before = model(x)["logits"]
    changed = x.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    after = model(changed)["logits"]
    assert before.shape == (2, 12, 256)
    assert torch.equal(before[:, :7], after[:, :7]) and not torch.allclose(before[:, 7:], after[:, 7:])


def test_it_starts_without_an_opinion():
    model, x = gpt(layers=4, width=64), torch.randint(256, (8, 12))
    assert model(x, x.roll(1, 1))["loss"].item() == pytest.approx(math.log(256), rel=0.02)
    assert model.blocks[0].qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.blocks[3].narrow.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.1)
    assert all(not b.any() for name, b in model.named_parameters() if name.endswith("bias"))


def test_one_matrix_reads_and_writes():
    model = gpt()
    names = [name for name, p in model.named_parameters() if 256 in p.shape]
    assert names == ["bytes.weight"]
    assert models.count_parameters(model) == 256 * 16 + 12 * 16 + 2 * (12 * 16 * 16 + 13 * 16) + 2 * 16


def test_its_attention_is_what_the_formula_says():
    model = gpt(layers=1, heads=1, width=4, context=3).double()
    x = torch.tensor([[5, 6, 7]])
    block = model.blocks[0]
    hidden = model.bytes(x) + model.positions.weight
    q, k, v = block.qkv(block.norm1(hidden)).split(4, dim=2)
    scores = (q @ k.transpose(1, 2) / 2.0).masked_fill(torch.ones(3, 3).triu(1).bool(), float("-inf"))
    hidden = hidden + block.project(scores.softmax(2) @ v)
    inner = block.wide(block.norm2(hidden))
    gelu = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    logits = model.norm(hidden + block.narrow(gelu)) @ model.bytes.weight.T
    assert torch.allclose(model(x)["logits"], logits, atol=1e-12)


def test_gpt2s_size_and_operations():
    with torch.device("meta"):
        model = GPT(layers=12, heads=12, width=768, context=1024)
    parameters = 124_439_808 - (50_257 - 256) * 768  # GPT-2's, but a byte for a word
    assert models.count_parameters(model) == parameters
    assert flops_per_token(model) == 6 * (parameters - 1024 * 768) + 12 * 12 * 768 * 1024


def test_writing_is_repeatable_and_goes_on():
    model = gpt().eval()
    one, same, other = (model.write(b"def f", 30, 1.0, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert one == same != other and len(one) == 30
    sure = [model.write(b"x" * 40, 5, 0.0, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert sure[0] == sure[1]
    logits = model(torch.tensor([list(b"x" * 12)]))["logits"][0, -1]
    assert sure[0][0] == int(logits.argmax())


def test_a_width_that_heads_do_not_divide():
    assert "--width 10 with --heads 4" in refusal(config, "--job text --width 10 --heads 4")


# --------------------------------------------------------------------------------------------------------- optimizers


def test_the_learning_rate_rises_and_falls():
    asked = config("--job text --warmup 4 --schedule cosine")
    factors = [optimizers.rate_factor(asked, step, 14) for step in range(14)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0] and factors[4] == 1.0
    assert factors[13] == pytest.approx(0.1) and all(a >= b for a, b in zip(factors[3:], factors[4:], strict=False))
    middle = optimizers.rate_factor(config("--job text --warmup 0"), 50, 101)
    assert middle == pytest.approx(0.55)
    constant = config("--warmup 2")
    assert [optimizers.rate_factor(constant, step, 5) for step in range(5)] == [0.5, 1, 1, 1, 1]
    assert optimizers.rate_factor(config("--job text --warmup 20"), 0, 1) == 0.05, "fewer steps than the warm-up"


def test_matrices_decay_and_the_rest_does_not():
    model = gpt()
    optimizer = optimizers.make(model, config("--job text"))
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {name for name, p in model.named_parameters() if id(p) in decayed} == {
        name for name, p in model.named_parameters() if p.ndim == 2
    }
    plain = optimizers.make(nn.Linear(2, 2, bias=False), config("--optimizer adamw"))
    assert len(plain.param_groups) == 1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_is_clipped_to_its_length(precision):
    asked = config(f"--lr 1 --clip 0.5 --precision {precision}")
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()
    update = optimizers.Update(model, asked, Precision(asked, CPU), 2)
    for step, pull in enumerate((100.0, 0.25)):
        update.zero_grad()
        update.precision.backward((model.weight * pull).sum())
        update.step(step)
    # Momentum 0.9: −0.5, then −(0.9 × 0.5 + 0.25).
    assert model.weight.item() == pytest.approx(-0.5 - 0.7)


def test_an_update_sets_the_rate_of_its_step():
    asked = config("--job text --warmup 2 --lr 0.4 --schedule constant")
    model = nn.Linear(1, 1)
    update = optimizers.Update(model, asked, Precision(asked, CPU), 3)
    rates = []
    for step in range(3):
        update.zero_grad()
        model(torch.ones(1, 1)).sum().backward()
        update.step(step)
        rates.append((update.learning_rate, *(group["lr"] for group in update.optimizer.param_groups)))
    assert rates == [(0.2,) * 3, (0.4,) * 3, (0.4,) * 3]
    assert optimizers.title(model, asked) == "fused AdamW"
