"""int8: what a message holds, and how far it is from what was said; no ranks."""

import pytest
import torch

from common.compression import BLOCK, dequantise, quantise


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("n", (1, 42, BLOCK, BLOCK + 1, 10 * BLOCK - 3))
def test_every_value_comes_back_within_half_a_step_of_its_block(n, dtype):
    generator = torch.Generator().manual_seed(n)
    sizes = torch.logspace(-6, 4, -(-n // BLOCK)).repeat_interleave(BLOCK)[:n]  # blocks of very different size
    values = (torch.randn(n, generator=generator) * sizes).to(dtype)
    message = quantise(values)
    assert message.dtype == torch.int8 and len(message) == n + 4 * -(-n // BLOCK)
    back = dequantise(message, n)
    assert back.dtype == torch.float32
    for block, again in zip(values.split(BLOCK), back.split(BLOCK), strict=True):
        step = block.abs().max().double() / 127
        assert (block.double() - again.double()).abs().max() <= step / 2 * (1 + 1e-5)
        largest = block.abs().argmax()
        assert again[largest] == pytest.approx(block[largest].item(), rel=1e-6)


def test_what_fits_the_steps_comes_back_exactly():
    values = torch.arange(-127, 128).float() / 8
    assert torch.equal(dequantise(quantise(values), 255), values)


@pytest.mark.parametrize("values", (torch.zeros(300), torch.full((300,), 1e-42)))
def test_nothing_and_almost_nothing_are_no_division_by_zero(values):
    assert (dequantise(quantise(values), 300) - values).abs().max() <= 1e-38


@pytest.mark.parametrize("bad", (float("inf"), float("-inf"), float("nan")))
def test_what_is_not_finite_is_seen_and_stays_in_its_block(bad):
    values = torch.ones(3 * BLOCK)
    values[BLOCK + 5] = bad
    back = dequantise(quantise(values), len(values))
    assert back[BLOCK : 2 * BLOCK].isnan().all()
    assert torch.equal(back[:BLOCK], values[:BLOCK]) and torch.equal(back[2 * BLOCK :], values[2 * BLOCK :])
