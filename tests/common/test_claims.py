"""A place that two processes claim, in PyTorch's own store: who comes second is refused, and those that wait hear of it."""

import dataclasses
import threading
import time

import pytest
import torch.distributed as dist

from common.claims import check_claims, claim
from common.errors import UsageError
from common.process_group import Meeting
from common.rank import Rank

TWICE = r"rank {0} is there twice, on node1 \(pid 10\) and on node2 \(pid 11\): give each node a --node_rank of its own"


def rank(number, world=3, **more):
    return Rank("t", number, world, 0, 1, number, "node1", 1, **more)


def here(node, pid):
    return {"host": f"node{node}", "pid": pid}


@pytest.fixture
def store():
    return dist.PrefixStore("launchlab/", dist.HashStore())


def test_each_place_is_claimed_once(store):
    for number in range(3):
        claim(store, rank(number), here(1, number))
    claim(store, rank(1), here(1, 1))  # the same process
    with pytest.raises(UsageError, match="rank 1 is there twice"):
        claim(store, rank(1), here(1, 4))


@pytest.mark.parametrize("number", (0, 1))
def test_those_that_wait_hear_of_a_rank_that_is_there_twice(store, number):
    """Two nodes with the same --node_rank: one rank of the three does not come, and nobody waits for it."""
    heard = {}

    def waits(number):
        me = rank(number)
        claim(store, me, here(1, 10))
        meeting = Meeting(store, me, 30.0)
        meeting.tell("here", here(1, 10))
        try:
            check_claims(meeting.hear("here", "did not arrive"))
        except UsageError as error:
            heard[number] = str(error)

    first = threading.Thread(target=waits, args=(number,), daemon=True)
    first.start()
    time.sleep(0.2)
    began = time.monotonic()
    with pytest.raises(UsageError, match=TWICE.format(number)) as raised:
        claim(store, rank(number), here(2, 11))
    first.join(10)
    assert heard == {number: str(raised.value)}
    assert time.monotonic() - began < 10


def test_worlds_of_different_sizes(store):
    claim(store, rank(0, 4), here(1, 10))
    with pytest.raises(
        UsageError, match=r"^rank 5 on node2 was told of 6 ranks in all, rank 0 on node1 of 4: give all nodes the same"
    ):
        claim(store, rank(5, 6), here(2, 11))
    with pytest.raises(UsageError, match="was told of 6 ranks"):
        check_claims([{"host": "node1"}, *[{"clash": "rank 5 on node2 was told of 6 ranks"}]])


def test_a_group_that_is_complete_is_left_alone(store):
    for number in range(2):
        claim(store, rank(number, 2), here(1, number))
        Meeting(store, rank(number, 2), 5.0).tell("here", here(1, number))
    with pytest.raises(UsageError, match="rank 1 is there twice"):
        claim(store, rank(1, 2), here(2, 9))
    check_claims(Meeting(store, rank(0, 2), 5.0).hear("here", "did not arrive"))


def test_an_agents_ranks_claim_nothing(store):
    """Their store may know the ranks of an earlier start."""
    served = dataclasses.replace(rank(0), store_is_served=True)
    claim(store, served, here(1, 10))
    claim(store, served, here(2, 11))
