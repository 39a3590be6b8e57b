"""Half precision, layouts in memory, fused and compiled kernels: the numbers stay what they must be."""

import json
import sys

import pytest
import torch
from torch import nn

from common import acceleration, models, optimizers
from common.checks import check_world
from common.command_line import parse_config
from common.gradients import choose_way
from common.ports import PortReservation
from common.precision import Precision
from common.rank import Rank
from tests.common.helpers import ROOT, end_group, refusal, run, start

CPU = torch.device("cpu")


def config(text=""):
    return parse_config("spawn.py", argv=text.split(), environment={})


# ------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("name", "weights", "products"),
    [
        ("fp64", torch.float64, torch.float64),
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.float32, torch.bfloat16),
        ("fp16", torch.float32, torch.float16),
    ],
)
def test_weights_and_products(name, weights, products):
    precision = Precision(config(f"--precision {name}"), CPU)
    layer = nn.Linear(3, 2).to(precision.weights)
    with precision.autocast():
        out = layer(torch.ones(1, 3, dtype=precision.weights))
        loss = models.mean_loss(out, torch.zeros(1, dtype=torch.long))
    assert precision.weights is weights and out.dtype is products
    assert loss.dtype is weights  # what is summed is not rounded to half
    precision.backward(loss)
    assert layer.weight.grad.dtype is weights


def step(precision, factor):
    """One step of SGD with learning rate 1 on one weight of 1 whose gradient is ``factor``, made by a product in half precision."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, fused=True)
    with precision.autocast():
        loss = layer(torch.ones(1, 1)).sum().float()
    precision.backward(loss * factor)
    precision.step(optimizer)
    return 1 - layer.weight.item()


def test_fp16_keeps_gradients_that_it_cannot_hold():
    """1e-8 is below fp16's smallest number; times the scale it is not."""
    layer = nn.Linear(1, 1, bias=False)
    for scaled, survives in ((True, True), (False, False)):
        precision = Precision(config("--precision fp16"), CPU)
        with precision.autocast():
            loss = layer(torch.ones(1, 1)).sum().float() * 1e-8
        layer.zero_grad()
        precision.backward(loss) if scaled else loss.backward()
        assert bool(layer.weight.grad.item()) is survives


def test_fp16_leaves_out_a_step_that_overflows_and_halves_its_scale():
    precision = Precision(config("--precision fp16"), CPU)
    before = precision.scaler.get_scale()
    assert step(precision, 1e6) == 0  # 1e6 × 65,536 overflows
    assert precision.scaler.get_scale() == before / 2 == 2**15
    assert step(precision, 0.25) == 0.25
    assert step(Precision(config("--precision bf16"), CPU), 1e6) == pytest.approx(1e6, rel=0.01)  # it has float32's range


# ---------------------------------------------------------------------------------------------------------- layout


class Mixed(nn.Module):
    """Weights of three, four and five dimensions and a buffer of four."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv1d(2, 4, 3), nn.Conv2d(2, 4, 3), nn.Conv3d(2, 4, 3)
        self.register_buffer("mean", torch.randn(1, 3, 4, 5))


def test_channels_last_is_for_what_has_four_dimensions():
    torch.manual_seed(0)
    model = Mixed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    placed = acceleration.placed(model, config("--channels_last"), CPU, torch.float32)
    assert placed.two.weight.is_contiguous(memory_format=torch.channels_last) and not placed.two.weight.is_contiguous()
    assert placed.mean.is_contiguous(memory_format=torch.channels_last)
    assert placed.one.weight.is_contiguous() and placed.three.weight.is_contiguous()
    assert all(torch.equal(tensor, before[name]) for name, tensor in placed.state_dict().items())
    flat = torch.ones(2, 3)
    assert acceleration.channels_last(flat) is flat


def test_channels_last_changes_neither_what_a_step_computes_nor_what_is_saved(tmp_path):
    from common import checkpoint

    digests, files = [], []
    for flags in ("--precision fp64", "--precision fp64 --channels_last"):
        asked = config(flags)
        model = acceleration.placed(models.build_model(asked), asked, CPU, torch.float64)
        digests.append(checkpoint.sha256(model))
        torch.manual_seed(1)
        x, y = torch.randn(5, 1, 28, 28, dtype=torch.float64), torch.arange(5)
        optimizer = optimizers.sgd(model, asked)
        for _ in range(2):
            optimizer.zero_grad()
            model(acceleration.channels_last(x) if asked.channels_last else x, y)["loss"].backward()
            optimizer.step()
        checkpoint.save(tmp_path / "model.pt", model, asked)
        files.append(torch.load(tmp_path / "model.pt", weights_only=True)["model"])
    assert digests[0] == digests[1]
    for name, tensor in files[0].items():
        assert files[1][name].is_contiguous()
        torch.testing.assert_close(files[1][name], tensor, rtol=1e-10, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_sgd_computes_what_sgd_computes(dtype):
    torch.manual_seed(0)
    model, other = nn.Linear(7, 5).to(dtype), nn.Linear(7, 5).to(dtype)
    other.load_state_dict(model.state_dict())
    assert optimizers.fused(model, config())
    one, two = optimizers.sgd(model, config("--lr 0.1")), torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, fused=False)
    assert one.param_groups[0]["fused"] is True
    for _ in range(3):
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        one.step()
        two.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_what_has_numbers_that_no_kernel_takes_is_not_fused():
    layer = nn.Linear(2, 2)
    layer.register_parameter("phase", nn.Parameter(torch.zeros(1, dtype=torch.complex64)))
    assert not optimizers.fused(layer, config())
    assert not optimizers.fused(nn.Linear(2, 2, device="meta"), config())


def test_a_first_step_left_out_by_fp16_leaves_no_momentum():
    """torch's fused SGD goes on with memory that nobody filled, so fp16 has the other one."""
    model = nn.Linear(300, 300, bias=False)
    nn.init.ones_(model.weight)
    optimizer, precision = optimizers.sgd(model, config("--precision fp16 --lr 1")), Precision(config("--precision fp16"), CPU)
    for factor in (float("inf"), 0.5):
        optimizer.zero_grad()
        precision.backward(model.weight.sum() * factor)
        precision.step(optimizer)
    assert torch.equal(model.weight, torch.full_like(model.weight, 0.5))


# ----------------------------------------------------------------------------------------------- unevenly many steps

UNEVEN = """
import json, sys
import torch
from common import optimizers
from common.command_line import parse_config
from common.gradients import DDP
from common.precision import Precision
from common.process_group import announce, process_group
from common.rank import Rank
from common.uneven import join
number, port = map(int, sys.argv[1:])
torch.set_num_threads(1)
config = parse_config("test.py", argv="--timeout 30 --precision fp16 --lr 0.001 --sampler uneven".split(), environment={})
cpu = torch.device("cpu")
with process_group(announce(Rank("test", number, 3, number, 3, 0, "127.0.0.1", port), config), cpu) as group:
    model, precision = torch.nn.Linear(1, 1, bias=False), Precision(config, cpu)
    gradients, optimizer, told = DDP(model, group, config), optimizers.sgd(model, config), []
    for epoch in range(2):
        with join(gradients.wrapped, optimizer, precision):
            for step in range(1 + number):  # 1, 2 and 3 steps; too large for fp16 in the first epoch
                optimizer.zero_grad()
                with precision.autocast():
                    loss = gradients.model(torch.ones(1, 1)).float().sum() * (1.0 if epoch else 1e6)
                precision.backward(loss)
                precision.step(optimizer)
        momentum = [state["momentum_buffer"].item() for state in optimizer.state.values()]
        told.append([precision.scaler.get_scale(), momentum, model.weight.item()])
    group.sum(torch.zeros(1, dtype=torch.float64))  # waits for gloo's threads, as a run's report does
    print(json.dumps(told))
"""


def test_ranks_that_ended_early_take_over_momentum_and_scale():
    with PortReservation(0) as port:
        children = [start([sys.executable, "-W", "error", "-c", UNEVEN, str(number), str(port)]) for number in range(3)]
        try:
            outputs = [child.communicate(timeout=50) for child in children]
        finally:
            for child in children:
                end_group(child)
    assert [child.returncode for child in children] == [0, 0, 0], outputs
    told = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    assert told[0] == told[1] == told[2]
    assert told[0][0][:2] == [2.0**13, [0.0]]  # three overflows, of which rank 0 saw one
    scale, (momentum,), _ = told[0][1]
    assert scale == 2.0**13 and momentum == pytest.approx(0.81 * 1 + 0.9 * 2 / 3 + 1 / 3)  # as many ranks had data: 3, 2, 1


# -------------------------------------------------------------------------------------------------- batch statistics


def test_sync_batchnorm_needs_cuda_and_batchnorm():
    assert "SyncBatchNorm runs on CUDA only" in refusal(acceleration.check, config("--sync_batchnorm"), CPU)
    acceleration.check(config("--sync_batchnorm"), torch.device("cuda"))
    assert "no BatchNorm" in refusal(acceleration.with_common_statistics, nn.Linear(2, 2))
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    assert isinstance(acceleration.with_common_statistics(model)[1], nn.SyncBatchNorm)


TWO_ON_ONE_GPU = """
import sys
import torch
from common import optimizers
from common.command_line import parse_config
from common.gradients import DDP, ByHand
from common.process_group import announce, process_group
from common.rank import Rank
number, port, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
config = parse_config("test.py", argv=["--timeout", "60", "--backend", "gloo", "--sync_batchnorm"], environment={})
device = torch.device("cuda", 0)
x = torch.linspace(-2, 3, 35, dtype=torch.float64, device=device).view(5, 7) ** 2

def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)).to(device, torch.float64)

with process_group(announce(Rank("test", number, 2, number, 2, 0, "127.0.0.1", port), config), device) as group:
    model = acceleration.with_common_statistics(net())
    gradients = DDP(model, group, config) if kind == "ddp" else ByHand(model, group)
    mine = x[:2] if number == 0 else x[2:]  # 2 and 3 of the 5 samples
    (gradients.model(mine).square().mean() * len(mine) * 2 / len(x)).backward()
    gradients.finish()
    alone = net()
    alone(x).square().mean().backward()
    for one, other in zip(model.parameters(), alone.parameters()):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(model[1].running_mean, alone[1].running_mean)
"""


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ("ddp", "by_hand"))
def test_two_ranks_normalise_as_one_does(kind):
    with PortReservation(0) as port:
        children = [start([sys.executable, "-c", TWO_ON_ONE_GPU, str(number), str(port), kind]) for number in (0, 1)]
        try:
            outputs = [child.communicate(timeout=120) for child in children]
        finally:
            for child in children:
                end_group(child)
    assert [child.returncode for child in children] == [0, 0], outputs


@pytest.mark.gpu
@pytest.mark.parametrize("flags", ("--precision bf16 --channels_last", "--precision fp16", "--compile", "--precision fp64"))
def test_the_digits_are_learned_on_cuda(tmp_path, flags):
    words = [sys.executable, str(ROOT / "launchers/plain.py"), "--device", "cuda", "--epochs", "6", *flags.split()]
    status, out, err = run([*words, "--result", str(tmp_path / "r.json")], limit=300)
    assert status == 0, err
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["eval_accuracy"][-1] > 0.9 and result["device"] == "cuda"
    assert result["fused_optimizer"] is ("fp16" not in flags)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--sampler uneven --sync by_hand", "--sampler uneven with --sync by_hand: a rank without data left"),
        ("--sampler uneven --sync by_hand_flat", "give --sync ddp"),
        ("--sampler uneven --sync_batchnorm", "--sampler uneven with --sync_batchnorm"),
        ("--precision fp16 --compress powersgd", "--compress powersgd with --precision fp16"),
        ("--precision bf32", "give one of fp32, fp64, bf16, fp16"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, words):
    assert words in refusal(config, flags)


def test_uneven_needs_a_sample_a_rank():
    check_world(config("--sampler uneven --global_batch_size 3"), 3)
    assert "give 3 or more" in refusal(check_world, config("--sampler uneven --global_batch_size 2"), 3)
    check_world(config("--sampler uneven --global_batch_size 3"), 3, samples=4)
    assert "none would be left for rank 0" in refusal(check_world, config("--sampler uneven --global_batch_size 3"), 3, 3)


def test_uneven_needs_ddp_which_apples_gpus_have_not():
    rank = Rank("test", 0, 2, 0, 2, 0, "127.0.0.1", 1)
    assert "--sampler uneven on mps" in refusal(choose_way, config("--sampler uneven"), rank, torch.device("mps"))


def test_compiling_ranks_may_take_longer():
    assert config().patience(True) == 60 and config("--compile").patience(True) == 600
    assert config("--compile --timeout 5").patience(True) == 5


def test_one_channel_is_laid_out_last_too():
    """torch calls such a tensor channels_last whatever its strides are; convolutions go by the strides."""
    picture = acceleration.channels_last(torch.arange(32.0).view(2, 1, 4, 4))
    assert picture.stride() == (16, 1, 4, 1) and picture.flatten().tolist() == list(range(32))
    model = acceleration.placed(models.CNN(), config("--channels_last"), CPU, torch.float32)
    assert model.conv1(acceleration.channels_last(torch.zeros(2, 1, 28, 28))).stride()[1] == 1


def test_a_parameter_may_be_used_for_the_first_time_in_a_later_step():
    asked, trained = config(), []
    for make in (
        lambda m: optimizers.sgd(m, asked),
        lambda m: torch.optim.SGD(m.parameters(), asked.learning_rate, momentum=0.9),
    ):
        torch.manual_seed(0)
        model = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        optimizer = make(model)
        for step in range(4):
            optimizer.zero_grad()
            x = torch.ones(2, 3) * (step + 1)
            for layer in model[: 1 + step // 2]:
                x = layer(x)
            x.square().sum().backward()
            optimizer.step()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert optimizers.fused(model, asked)
    assert torch.allclose(*trained, rtol=1e-6) and trained[0].isfinite().all()
