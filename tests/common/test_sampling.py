"""Which samples each rank sees: each once, weighted so that N ranks compute what one computes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data.distributed import DistributedSampler

from common.command_line import parse_config
from common.rank import Rank
from common.sampling import Distributed, Exact, Uneven, make_sampler, part_of


def ranks(world):
    return [Rank("test", r, world, r, world, 0, "127.0.0.1", 1) for r in range(world)]


@st.composite
def runs(draw):
    """(samples, global batch, world size, accumulate)."""
    length = draw(st.integers(1, 80))
    return length, draw(st.integers(1, length)), draw(st.integers(1, 9)), draw(st.integers(1, 4))


def everyone(run, epoch=0, seed=0):
    """Per rank the list of steps, each a list of shares; and the samplers."""
    length, batch, world, accumulate = run
    samplers = [Exact(length, batch, rank, seed, accumulate) for rank in ranks(world)]
    return [list(sampler.epoch(epoch)) for sampler in samplers], samplers


def counted(share):
    return share.indices[: share.samples].tolist()


@given(runs(), st.integers(0, 3), st.integers(0, 2**31 - 1))
def test_every_sample_counts_once_an_epoch(run, epoch, seed):
    by_rank, _ = everyone(run, epoch, seed)
    seen = [index for steps in by_rank for shares in steps for share in shares for index in counted(share)]
    assert sorted(seen) == list(range(run[0]))


@given(runs())
def test_all_ranks_take_the_same_steps_of_the_same_passes(run):
    length, batch, _, accumulate = run
    by_rank, samplers = everyone(run)
    assert {len(steps) for steps in by_rank} == {math.ceil(length / batch)} == {s.steps for s in samplers}
    assert all(len(shares) == accumulate for steps in by_rank for shares in steps)
    assert all(len(share.indices) >= 1 for steps in by_rank for shares in steps for share in shares)


@given(runs())
def test_parts_of_a_step_differ_by_one_sample_at_most_and_make_up_the_batch(run):
    by_rank, samplers = everyone(run)
    for step, sizes in enumerate(zip(*[[[s.samples for s in shares] for shares in steps] for steps in by_rank], strict=True)):
        flat = [n for shares in sizes for n in shares]
        assert max(flat) - min(flat) <= 1
        assert all(sum(flat) == float(sampler.batch_samples()[step]) for sampler in samplers)
    assert all(sampler.batch_samples().sum() == run[0] == sampler.samples_per_epoch for sampler in samplers)


@given(runs())
def test_the_weighted_average_over_ranks_is_the_mean_of_the_global_batch(run):
    length, batch, world, accumulate = run
    by_rank, _ = everyone(run)
    gradient = np.random.default_rng(5).normal(size=length)  # of each sample
    order = np.random.default_rng([0, 0]).permutation(length)
    for step in range(math.ceil(length / batch)):
        whole = gradient[order[step * batch : (step + 1) * batch]].mean()
        own = [sum(gradient[s.indices.numpy()].mean() * s.weight for s in steps[step]) for steps in by_rank]
        assert sum(own) / world == pytest.approx(whole, rel=1e-12, abs=1e-14)
        assert sum(s.weight for steps in by_rank for s in steps[step]) / world == pytest.approx(1, rel=1e-12)


def test_a_rank_without_samples_gets_a_stand_in_of_weight_0():
    by_rank, _ = everyone((2, 2, 5, 1))
    shares = [steps[0][0] for steps in by_rank]
    empty = [share for share in shares if share.samples == 0]
    assert len(empty) == 3
    assert all(share.weight == 0 and len(share.indices) == 1 and 0 <= int(share.indices[0]) < 2 for share in empty)
    assert all(share.weight > 0 and len(share.indices) == share.samples for share in shares if share.samples)


@given(runs())
def test_the_batches_do_not_depend_on_the_number_of_ranks(run):
    length, batch, world, accumulate = run
    alone, _ = everyone((length, batch, 1, 1))
    shared, _ = everyone(run)
    for step, (share,) in enumerate(alone[0]):
        together = [index for steps in shared for s in steps[step] for index in counted(s)]
        assert together == counted(share)


def order_of(epoch, seed, length=50):
    return Exact(length, length, Rank("t"), seed).epoch(epoch).__next__()[0].indices.tolist()


def test_epochs_and_seeds_have_orders_of_their_own_and_the_same_ones_repeat():
    orders = [tuple(order_of(epoch, seed)) for epoch in range(5) for seed in range(5)]
    assert len(set(orders)) == 25
    assert order_of(3, 7) == order_of(3, 7) != list(range(50))


@given(st.integers(0, 200), st.integers(1, 20))
def test_parts_follow_on_each_other(samples, parts):
    cut = [part_of(samples, parts, index) for index in range(parts)]
    assert [i for part in cut for i in range(samples)[part]] == list(range(samples))
    sizes = [part.stop - part.start for part in cut]
    assert max(sizes) - min(sizes) <= 1


# -------------------------------------------------------------------------------------------- PyTorch's own sampler


@given(runs(), st.integers(0, 3))
def test_distributed_pads_as_pytorch_does(run, epoch):
    length, per_part, world, accumulate = run
    batch = per_part * world * accumulate
    for rank in ranks(world):
        ours = Distributed(length, batch, rank, seed=3, accumulate=accumulate)
        steps = list(ours.epoch(epoch))
        theirs = DistributedSampler(range(length), num_replicas=world, rank=rank.rank, seed=3)
        theirs.set_epoch(epoch)
        seen = [index for shares in steps for share in shares for index in counted(share)]
        assert seen == list(theirs) and len(seen) == math.ceil(length / world)
        assert len(steps) == ours.steps == len(ours.batch_samples())
        assert ours.samples_per_epoch == len(seen) * world == ours.batch_samples().sum()
        for step, shares in enumerate(steps):
            assert sum(s.samples for s in shares) * world == ours.batch_samples()[step]
            assert sum(s.weight for s in shares) == pytest.approx(1)
            assert all(len(s.indices) >= 1 and (s.samples or s.weight == 0) for s in shares)


# ------------------------------------------------------------------------------------------------ unevenly much data


@st.composite
def uneven_runs(draw):
    """(samples, global batch, world size, accumulate) that ``check_world`` lets through."""
    world = draw(st.integers(1, 6))
    length = draw(st.integers(max(world, (3 * world) // 2), 90))
    return length, draw(st.integers(world, length)), world, draw(st.integers(1, 3))


@given(uneven_runs(), st.integers(0, 3))
def test_uneven_ranks_make_steps_of_their_own_until_their_data_ends(run, epoch):
    length, batch, world, accumulate = run
    samplers = [Uneven(length, batch, rank, seed=3, accumulate=accumulate) for rank in ranks(world)]
    by_rank = [list(sampler.epoch(epoch)) for sampler in samplers]
    seen = [index for steps in by_rank for shares in steps for share in shares for index in counted(share)]
    assert sorted(seen) == list(range(length))
    parts = [sum(share.samples for shares in steps for share in shares) for steps in by_rank]
    whole = sum(range(world, 2 * world))
    assert all(abs(part - length * (world + r) / whole) < 1 for r, part in enumerate(parts)) and min(parts) >= 1
    for sampler in samplers:
        assert sampler.steps == max(map(len, by_rank)) == len(sampler.batch_samples())
        assert sampler.samples_per_epoch == length == sampler.batch_samples().sum()


@given(uneven_runs())
def test_the_gradient_of_uneven_ranks_is_the_mean_over_those_that_still_have_data(run):
    length, batch, world, accumulate = run
    gradient = np.random.default_rng(5).normal(size=length)  # of each sample
    samplers = [Uneven(length, batch, rank, seed=3, accumulate=accumulate) for rank in ranks(world)]
    by_rank = [list(sampler.epoch(0)) for sampler in samplers]
    for step in range(samplers[0].steps):
        active = [steps[step] for steps in by_rank if step < len(steps)]
        brought = [index for shares in active for share in shares for index in counted(share)]
        averaged = sum(gradient[s.indices.numpy()].mean() * s.weight for shares in active for s in shares) / world
        assert averaged == pytest.approx(gradient[brought].mean(), rel=1e-12, abs=1e-14)
        assert all(sampler.batch_samples()[step] == len(brought) for sampler in samplers)
        assert all(len(s.indices) >= 1 for shares in active for s in shares)


def test_the_last_of_uneven_ranks_makes_most_steps():
    steps = [len(list(Uneven(1437, 64, rank, 0).epoch(0))) for rank in ranks(4)]
    assert steps == [17, 21, 25, 29]


def test_one_uneven_rank_does_what_one_exact_rank_does():
    for one, other in zip(Uneven(23, 5, Rank("t"), 7).epoch(2), Exact(23, 5, Rank("t"), 7).epoch(2), strict=True):
        assert all(torch.equal(a.indices, b.indices) and a.weight == b.weight for a, b in zip(one, other, strict=True))


def test_distributed_counts_samples_twice_where_exact_does_not():
    both = {}
    for kind in (Exact, Distributed):
        shares = [share for r in ranks(3) for step in kind(10, 3, r, 0).epoch(0) for share in step]
        both[kind] = sum(share.samples for share in shares)
    assert both == {Exact: 10, Distributed: 12}


@pytest.mark.parametrize(("name", "kind"), [("exact", Exact), ("distributed", Distributed), ("uneven", Uneven)])
def test_the_flag_picks_the_sampler(name, kind):
    argv = f"--sampler {name} --batch_size 2 --accumulate 2 --seed 9".split()
    sampler = make_sampler(parse_config("t", argv=argv, environment={}), 13, ranks(3)[1])
    assert type(sampler) is kind
    sizes = [[share.samples for share in shares] for shares in sampler.epoch(0)]
    assert sizes[0] == [2, 2] and len(sizes) == (1 if kind is Uneven else 2)  # rank 1 has 4 of the 13
    again = kind(13, 12, ranks(3)[1], 9, 2)
    assert all(
        torch.equal(a.indices, b.indices)
        for one, two in zip(sampler.epoch(1), again.epoch(1), strict=True)
        for a, b in zip(one, two, strict=True)
    )
