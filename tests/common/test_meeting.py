"""meeting.py: who is waited for, and how the watchers of several nodes find each other."""

import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from common import meeting
from common.errors import RunError, UsageError
from common.meeting import Meeting, Waiting, WatcherLink, listed
from common.ports import PortReservation
from common.rank import Rank

HERE = socket.gethostname()


def rank(number, local=0, port=1, host="127.0.0.1"):
    """One of two nodes with two ranks each."""
    return Rank("t", number, 4, local, 2, number // 2, host, port)


def test_ranks_are_listed_as_a_person_would():
    assert listed([1]) == "rank 1" and listed([1, 3]) == "ranks 1, 3"
    assert listed(list(range(20))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 and 4 more"


def test_a_wait_is_told_once_and_then_now_and_then_by_a_node_s_first_rank(capfd, monkeypatch):
    monkeypatch.setattr(meeting, "SPEAK_S", (0.1, 60.0))
    monkeypatch.setattr(meeting, "AGAIN_S", 0.4)
    several = [Waiting(rank(2, 0), 600), Waiting(rank(3, 1), 600), Waiting(Rank("t", 0, 2, 0, 2, 0, "127.0.0.1", 1), 60)]
    told = []
    until = time.monotonic() + 0.75
    while time.monotonic() < until:
        for each in several:
            each(lambda: "rank 0")
        told.append(capfd.readouterr().err)
        time.sleep(0.01)
    assert "".join(told) == f"Rank 2 on {HERE} waits for rank 0 (up to 600 s, --timeout)\n" * 2 and told[0] == ""


@pytest.mark.parametrize(
    ("host", "reason"), [("127.0.0.1", ""), ("no-such-host.invalid", ": (Name or service not known|Temporary failure .*)")]
)
def test_who_waits_for_rank_0_says_where_and_what_stands_in_the_way(capfd, monkeypatch, host, reason):
    monkeypatch.setattr(meeting, "SPEAK_S", (0.1, 0.1))
    with PortReservation(0) as port, pytest.raises(RunError, match="rank 2 waited 0.3 s"):
        meeting.open_store(rank(2, port=port, host=host), time.monotonic() + 0.3, 0.3)
    line = rf"Rank 2 on {HERE} waits for rank 0 at {host}:{port}{reason} \(up to 0.3 s, --timeout\)\n"
    assert re.fullmatch(line, capfd.readouterr().err)


@pytest.fixture
def store():
    """A store that this process serves."""
    with PortReservation(0) as port:
        yield dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def test_missing_ranks_are_told_while_waiting(store):
    there = Meeting(store, rank(0), 5.0)
    for number in (0, 2):
        Meeting(store, rank(number, number % 2), 5.0).tell("x", number)
    heard = []

    def others(missing):
        heard.append(missing())
        if len(heard) == 1:
            for number in (1, 3):
                Meeting(store, rank(number, 1), 5.0).tell("x", number)

    assert there.hear("x", "did not come", meanwhile=others) == [0, 1, 2, 3]
    assert heard[0] == "ranks 1, 3"


def of_all(store, do):
    """What ``do(meeting)`` returns or is refused on each of the four ranks, which the last one begins."""
    with ThreadPoolExecutor(4) as pool:
        ranks = [pool.submit(do, Meeting(store, rank(number, number % 2), 5.0)) for number in (3, 2, 1, 0)]
        return [each.exception(10) or each.result() for each in reversed(ranks)]


def test_a_node_s_first_rank_makes_what_its_others_then_find(store):
    made = []

    def make(number):
        time.sleep(0.1 if number % 2 == 0 else 0)
        made.append(number)
        return number

    assert of_all(store, lambda m: meeting.once_per_node(m, lambda: make(m.rank.rank))) == [0, 1, 2, 3]
    assert made.index(0) < made.index(1) and made.index(2) < made.index(3)
    assert meeting.once_per_node(None, lambda: 7) == 7


def test_who_is_refused_what_all_need_is_so_on_every_rank(store):
    def refused(m):
        if m.rank.rank == 0:
            raise UsageError("no such file")
        raise AssertionError("rank 0 alone looks")

    told = of_all(store, lambda m: meeting.by_rank_0(m, lambda: refused(m)))
    assert [str(error) for error in told] == ["no such file"] * 4 and {type(error) for error in told} == {UsageError}


def test_what_differs_from_rank_0_s_is_told_on_every_rank(store):
    told = of_all(store, lambda m: meeting.check_alike(m, {"samples": 5, "digest": m.rank.rank // 2}, "give the same"))
    assert [str(error) for error in told] == ["rank 2 has digest 1 where rank 0 has 0; give the same"] * 4


def test_what_all_ranks_have_alike_is_well(store):
    assert of_all(store, lambda m: meeting.check_alike(m, {"samples": 5}, "")) == [None] * 4
    assert meeting.check_alike(None, {"samples": 5}, "") is None


class Watcher:
    """Stands for a rank's line to its watcher, and keeps what is said."""

    def __init__(self):
        self.said = []

    def ask(self, **message):
        self.said.append(message)
        return {"port": 7, "token": "t"}

    def tell(self, **message):
        self.said.append(message)


def link(store, number, local, monkeypatch):
    line = Watcher()
    monkeypatch.setattr(meeting, "watcher", lambda: line)
    return WatcherLink(store, rank(number, local)), line


def test_rank_0_s_watcher_is_found_by_each_other_node_s(store, monkeypatch):
    first, asked = link(store, 0, 0, monkeypatch)
    second, told = link(store, 2, 0, monkeypatch)
    third, silent = link(store, 3, 1, monkeypatch)
    second.seek()
    assert told.said == []  # rank 0 is not there yet
    first.offer()
    for each in (second, third, second, first):
        each.seek()
    assert asked.said == [{"event": "listen"}] and silent.said == []
    assert told.said == [{"event": "connect", "addresses": ["127.0.0.1"], "port": 7, "token": "t"}]
    assert json.loads(store.get(WatcherLink.KEY))["address"] == "127.0.0.1"


def test_one_node_needs_no_link(store, monkeypatch):
    line = Watcher()
    monkeypatch.setattr(meeting, "watcher", lambda: line)
    alone = WatcherLink(store, Rank("t", 0, 2, 0, 2, 0, "127.0.0.1", 1))
    alone.offer()
    alone.seek()
    assert line.said == [] and not store.check([WatcherLink.KEY])
