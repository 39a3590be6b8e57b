"""``--compress``: what is sent is smaller, what is learned is nearly the same, and every rank has the same bits."""

import functools

import pytest
from bits import USES_ALL, USES_SOME, digests
from running import command, trained
from test_parity import JOBS, difference

from common.config import COMPRESSIONS

pytestmark = pytest.mark.launch

PARAMETERS = 421_642
# The loss of the first 20 steps against that of uncompressed gradients: no more than this part of it.
LOST = {"fp16": 0.01, "bf16": 0.05, "int8": 0.05, "powersgd": 0.5}
SENT = {
    "fp16": 2 * PARAMETERS,
    "bf16": 2 * PARAMETERS,
    "int8": PARAMETERS + 4 * -(-PARAMETERS // 256),
    # The matrices that two directions halve: 32×9, 64×288, 128×3136, 10×128; the four vectors as they are.
    "powersgd": 4 * (2 * (32 + 9 + 64 + 288 + 128 + 3136 + 10 + 128) + 32 + 64 + 128 + 10),
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The result of four epochs of digits on two ranks, by compression (None: uncompressed)."""
    folder = tmp_path_factory.mktemp("learned")

    @functools.cache
    def get(name):
        more = ("--compress", name) if name else ()
        return trained(command("torchrun", 2, "--epochs", 4, "--threads", 1, *more), folder / f"{name}.json")

    return get


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_digits_are_learned(learned, name):
    exact, lossy = learned(None), learned(name)
    assert (exact["compress"], lossy["compress"], lossy["sync"]) == (None, name, "ddp")
    assert exact["eval_accuracy"][-1] > 0.95 and abs(lossy["eval_accuracy"][-1] - exact["eval_accuracy"][-1]) < 0.03
    assert 0 < difference(lossy["loss_per_step"][:20], exact["loss_per_step"][:20]) < LOST[name]


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_bytes_sent(learned, name):
    assert learned(None)["bytes_per_step"] == 4 * PARAMETERS
    assert learned(name)["bytes_per_step"] == SENT[name]


WITH = {
    "buckets": ("--bucket_mb", 0.001),
    "accumulate": ("--bucket_mb", 0.001, "--accumulate", 2),
    "unused": ("--bucket_mb", 0.001, "--find_unused_parameters"),
    "fp64": ("--precision", "fp64"),
}


@pytest.fixture(scope="module")
def on_three(tmp_path_factory):
    """The result of three ranks and their digests, by case of ``WITH`` and compression (None: uncompressed)."""

    @functools.cache
    def get(case, name):
        folder = tmp_path_factory.mktemp("bits")
        (folder / "mine.py").write_text(USES_SOME if case == "unused" else USES_ALL)
        flags = ("--job", "random", *JOBS["random"], "--model", "mine:Net", "--threads", 1, *WITH[case])
        more = ("--compress", name) if name else ()
        return trained(command("mpi", 3, *flags, *more), folder / "result.json", cwd=folder), digests(folder)

    return get


@pytest.mark.parametrize("case", WITH)
@pytest.mark.parametrize("name", COMPRESSIONS)
def test_same_bits_on_all_ranks(on_three, name, case):
    """Of three, through several buckets; close to what uncompressed gradients give."""
    (exact, _), (lossy, bits) = on_three(case, None), on_three(case, name)
    assert len(bits) == 3 and len(set(bits)) == 1
    assert lossy["bytes_per_step"] < exact["bytes_per_step"]
    assert 0 < difference(lossy["loss_per_step"], exact["loss_per_step"]) < 0.1
