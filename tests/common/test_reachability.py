"""Addresses that are tried, with real sockets: silence, refusal and somebody else's answer are all no."""

import dataclasses
import socket
import threading
import time

import pytest

from common.errors import UsageError
from common.interfaces import interfaces
from common.reachability import Probe, Told, reached, reached_by_all


def test_a_machine_reaches_itself_at_all_its_addresses():
    with Probe() as probe:
        told = dataclasses.replace(probe.told, addresses=(*probe.told.addresses, "127.0.0.1", "localhost"))
        assert reached(told) == list(told.addresses)
    assert set(probe.told.addresses) <= {i.address for i in interfaces()}
    assert not any(a.startswith(("127.", "fe80:", "169.254.")) or a == "::1" for a in probe.told.addresses)
    assert probe.told.host == socket.gethostname()
    assert reached(told, 1.0) == [], "it listens no longer"


def test_what_answers_nothing_or_something_else_is_not_reached():
    with Probe("127.0.0.1") as probe, socket.create_server(("127.0.0.1", 0)) as silent:
        assert probe.told.addresses == ("127.0.0.1",)
        assert reached(dataclasses.replace(probe.told, token=b"x" * 16)) == [], "another process's token"
        began = time.monotonic()
        assert reached(dataclasses.replace(probe.told, port=silent.getsockname()[1]), 0.5) == []
        assert time.monotonic() - began < 5
        odd = ("127.0.0.1", "no-such-host.invalid", "x" * 300, "")
        assert reached(dataclasses.replace(probe.told, addresses=odd))[0] == "127.0.0.1"


def test_many_at_once():
    with Probe("127.0.0.1") as probe:
        found = []
        threads = [threading.Thread(target=lambda: found.append(reached(probe.told))) for _ in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert found == [["127.0.0.1"]] * 64


TOLD = Told("node1", ("172.17.0.1", "10.0.0.1", "10.1.0.1"), 1, b"")


def test_the_first_address_that_all_reach():
    by_rank = [("node1", TOLD.addresses), ("node2", ("10.0.0.1", "10.1.0.1")), ("node3", ("10.0.0.1",))]
    assert reached_by_all(TOLD, by_rank) == "10.0.0.1"


@pytest.mark.parametrize(
    "by_rank, from_where",
    [
        ([("node1", TOLD.addresses), ("node2", ()), ("node3", ()), ("node3", ())], "node2, node3"),
        ([("node1", TOLD.addresses), ("node2", ("10.0.0.1",)), ("node3", ("10.1.0.1",))], "all other hosts at one and the same"),
    ],
)
def test_none_that_all_reach(by_rank, from_where):
    said = rf"^rank 0 on node1 is not reached from {from_where} \(tried 172.17.0.1, 10.0.0.1, 10.1.0.1\); give --master_addr"
    with pytest.raises(UsageError, match=said):
        reached_by_all(TOLD, by_rank)


def test_a_machine_without_a_network():
    with pytest.raises(UsageError, match=r"\(tried none but the loopback interface's\)"):
        reached_by_all(Told("node1", (), 1, b""), [("node1", ()), ("node2", ())])
