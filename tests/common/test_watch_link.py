"""The watchers of several nodes, linked over real sockets: what is known on one is known on all, and nothing depends on it."""

import json
import os
import selectors
import signal
import socket
import sys
import time

import pytest

from common import watch_link
from common.watch import LINK_S
from common.watch_link import Links
from tests.common.helpers import end_group, until
from tests.common.watching import ASKED_TO_LEAVE, KILLED, SLEEP, Run, failing

pytestmark = [pytest.mark.launch, pytest.mark.skipif(sys.platform != "linux", reason="the watcher needs pidfds")]

ALL_DONE = "reporter.ask(event='done'); reporter.close()"
LATER = "print('told', flush=True); time.sleep(60)"


class Nodes:
    """Nodes on this machine, each with a watcher of its own, linked as ranks of several hosts link theirs."""

    def __init__(self, folder, *nodes, link=True, **about):
        self.runs = []
        first = 0
        for number, codes in enumerate(nodes):
            more = {"host": f"host{number}", "node": number, "ranks_here": len(codes)} | about
            self.runs.append(Run(folder, *codes, first=first, **more))
            first += len(codes)
        if link:
            self.listen()
            for run in self.runs[1:]:
                self.connect(run)
            assert until(lambda: [len(self.linked(run)) for run in self.runs] == [len(nodes) - 1] + [1] * (len(nodes) - 1))

    def ask(self, run, event):
        run.do(0, f"print(json.dumps(reporter.ask(event={event!r})), flush=True)")
        return json.loads(run.ranks[0].stdout.readline())

    def listen(self):
        self.offer = self.ask(self.runs[0], "listen")

    def linked(self, run):
        """The other nodes that a node's watcher knows, in words."""
        return self.ask(run, "who is linked")["nodes"]

    def connect(self, run, addresses=("127.0.0.1",), **other):
        offer = {"event": "connect", "addresses": list(addresses)} | self.offer | other
        run.do(0, f"reporter.tell(**{offer!r})")

    def go(self):
        for run in self.runs:
            run.go()

    def statuses(self):
        return [run.statuses() for run in self.runs]

    def said(self):
        return [run.said() for run in self.runs]


@pytest.fixture
def begin(tmp_path):
    """Starts nodes, and ends what is left of them."""
    made = []

    def make(*nodes, **options):
        made.append(Nodes(tmp_path, *nodes, **options))
        return made[-1]

    yield make
    for nodes in made:
        for run in nodes.runs:
            for rank in run.ranks:
                end_group(rank)


def test_a_death_is_told_on_every_node_and_ends_all(begin):
    nodes = begin((SLEEP, SLEEP), (SLEEP, KILLED), (SLEEP,))
    began = time.monotonic()
    nodes.go()
    killed, asked = -signal.SIGKILL, -signal.SIGTERM
    assert nodes.statuses() == [[asked, asked], [asked, killed], [asked]]
    assert time.monotonic() - began < 5
    sentence = f"Rank 3 on host1 (pid {nodes.runs[1].ranks[1].pid}) was killed by SIGKILL; ending the "
    assert nodes.said() == [f"{sentence}{rest} here.\n" for rest in ("2 ranks", "other 1 rank", "1 rank")]


def test_a_traceback_is_shown_where_it_happened_and_on_node_0(begin):
    raises = "reporter.ask(event='failed', cause='failed: it broke', traceback='Traceback: line 1\\n'); sys.exit(1)"
    nodes = begin((SLEEP,), (raises,), (SLEEP,))
    nodes.go()
    assert [status for (status,) in nodes.statuses()] == [-signal.SIGTERM, 1, -signal.SIGTERM]
    assert ["Traceback" in said for said in nodes.said()] == [True, True, False]
    assert all("Rank 1 on host1" in said and "failed: it broke" in said for said in nodes.said())


def test_the_cause_wins_over_peers_on_other_nodes_that_noticed_first(begin):
    lost = failing("lost a peer", "lost another rank: closed")
    nodes = begin((lost,), (failing("failed", "failed: it broke", 0.3),), (lost,))
    nodes.go()
    assert nodes.statuses() == [[1], [1], [1]]
    assert all("Rank 1 on host1" in said and "it broke" in said and "lost" not in said for said in nodes.said())


def test_of_those_that_lost_a_peer_all_nodes_name_the_same(begin):
    lost = failing("lost a peer", "lost another rank: closed")
    nodes = begin((SLEEP,), (lost, SLEEP), (lost, SLEEP))
    nodes.go()
    nodes.statuses()
    named = {said.partition(" lost another rank: closed; ending the ")[0] for said in nodes.said()}
    assert len(named) == 1 and named.pop().startswith("Rank "), nodes.said()


def test_who_did_not_speak_when_all_others_timed_out_is_named(begin):
    late = failing("lost a peer", "lost another rank: Timed out waiting 3000ms")
    nodes = begin((late, late), (late, SLEEP))
    nodes.go()
    nodes.statuses()
    assert all("Timed out waiting 3000ms; rank 3 on host1 has said nothing (hanging" in said for said in nodes.said())


def test_a_host_that_dies_is_named_with_its_ranks(begin):
    nodes = begin((SLEEP, SLEEP), (LATER, LATER), (SLEEP,))
    nodes.go()
    for rank in nodes.runs[1].ranks:
        assert rank.stdout.readline() == "told\n"
    os.kill(nodes.runs[1].watcher, signal.SIGKILL)
    for rank in nodes.runs[1].ranks:
        rank.kill()
    assert nodes.runs[0].statuses() == [-signal.SIGTERM] * 2 and nodes.runs[2].statuses() == [-signal.SIGTERM]
    sentence = f"Node 1 (host1, ranks 2, 3) {watch_link.GONE}; ending the "
    assert (nodes.said()[0], nodes.said()[2]) == (f"{sentence}2 ranks here.\n", f"{sentence}1 rank here.\n")


def test_the_death_of_node_0_s_host_is_noticed_on_each_other(begin):
    nodes = begin((SLEEP,), (SLEEP,), (SLEEP,))
    os.kill(nodes.runs[0].watcher, signal.SIGKILL)
    nodes.runs[0].ranks[0].kill()
    nodes.go()
    for run in nodes.runs[1:]:
        assert run.statuses() == [-signal.SIGTERM]
        assert run.said() == f"Node 0 (host0, rank 0) {watch_link.GONE}; ending the 1 rank here.\n"


def test_a_watcher_that_a_launcher_ends_with_its_finished_ranks_is_no_death(begin):
    nodes = begin((f"time.sleep(1); {ALL_DONE}",), (f"{ALL_DONE}; {LATER}",))
    nodes.go()
    assert nodes.runs[1].ranks[0].stdout.readline() == "told\n"
    os.kill(nodes.runs[1].watcher, signal.SIGKILL)
    nodes.runs[1].ranks[0].kill()
    assert nodes.runs[0].statuses() == [0] and nodes.said() == ["", ""]


@pytest.mark.parametrize("first", (0, 1))
def test_a_node_may_end_before_the_others(begin, first):
    """Its watcher leaves at once, and the others go on and end as if alone."""
    codes = [(ALL_DONE,) if node == first else (f"time.sleep(1.5); {ALL_DONE}",) for node in (0, 1)]
    nodes = begin(*codes)
    nodes.go()
    began = time.monotonic()
    assert nodes.runs[first].statuses() == [0] and time.monotonic() - began < 1.4
    assert nodes.statuses() == [[0], [0]] and nodes.said() == ["", ""]


def test_an_interruption_is_silent_where_it_came_and_named_elsewhere(begin):
    nodes = begin((SLEEP,), (failing("interrupted", "was interrupted"),))
    nodes.go()
    assert nodes.statuses() == [[-signal.SIGTERM], [1]]
    assert nodes.said()[0] == f"Rank 1 on host1 (pid {nodes.runs[1].ranks[0].pid}) was interrupted; ending the 1 rank here.\n"
    assert nodes.said()[1] == ""


def test_the_launcher_s_request_to_leave_is_not_the_cause(begin):
    """SIGTERM may have come from a launcher that knew of the death before its watcher had told the other nodes."""
    nodes = begin((ASKED_TO_LEAVE,), (f"time.sleep(0.3); {KILLED}",))
    nodes.go()
    nodes.statuses()
    assert all(said.startswith("Rank 1 on host1") and "was killed by SIGKILL" in said for said in nodes.said())


@pytest.mark.parametrize("shared", (False, True))
def test_in_a_terminal_that_all_nodes_share_it_is_said_once(begin, shared):
    nodes = begin((SLEEP,), (KILLED,), (SLEEP,), one_terminal=shared)
    nodes.go()
    nodes.statuses()
    assert sum("was killed by SIGKILL" in said for said in nodes.said()) == (1 if shared else 3)


@pytest.mark.parametrize("shared", (False, True))
def test_a_refusal_of_all_is_told_once_a_terminal(begin, shared):
    nodes = begin(*[(failing("refused", "--epochs 0: no"),)] * 3, one_terminal=shared)
    nodes.go()
    nodes.statuses()
    said = [line for text in nodes.said() for line in text.splitlines()]
    assert len(said) == (1 if shared else 3)
    assert all(line.endswith("error: --epochs 0: no") for line in said)


def test_a_node_that_comes_after_the_failure_is_ended_too(begin):
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    nodes = begin((SLEEP, deaf), (SLEEP,), link=False)
    nodes.listen()
    nodes.runs[0].go(1)  # the watcher is there for two seconds more
    assert nodes.runs[0].ranks[1].stdout.readline() == "deaf\n"
    nodes.runs[0].ranks[0].kill()
    assert until(lambda: "Rank 0 on host0" in nodes.said()[0])
    nodes.connect(nodes.runs[1])
    nodes.runs[1].go()
    assert nodes.runs[1].statuses() == [-signal.SIGTERM] and "Rank 0 on host0" in nodes.said()[1]


def test_a_node_that_is_linked_after_the_death_of_node_0_s_last_rank_is_ended_too(begin):
    nodes = begin((KILLED,), (SLEEP,), link=False, world_size=2)
    nodes.listen()
    nodes.runs[0].go()
    assert nodes.runs[0].statuses() == [-signal.SIGKILL]  # and its name is free for the next run
    nodes.connect(nodes.runs[1])
    nodes.runs[1].go()
    assert nodes.runs[1].statuses() == [-signal.SIGTERM]
    assert all(said.startswith("Rank 0 on host0") for said in nodes.said())
    assert until(lambda: not os.path.exists(f"/proc/{nodes.runs[0].watcher}"), 2), "it has nobody to wait for any more"


def test_a_death_on_a_node_that_is_about_to_be_linked_is_told(begin):
    nodes = begin((SLEEP,), (KILLED,), link=False, world_size=2)
    nodes.listen()
    os.kill(nodes.runs[0].watcher, signal.SIGSTOP)  # the network is slow
    nodes.connect(nodes.runs[1])
    nodes.go()
    assert nodes.runs[1].statuses() == [-signal.SIGKILL]
    os.kill(nodes.runs[0].watcher, signal.SIGCONT)
    assert nodes.runs[0].statuses() == [-signal.SIGTERM]
    assert all(said.startswith("Rank 1 on host1") for said in nodes.said()), nodes.said()


def test_a_watcher_leaves_though_a_node_never_comes(begin):
    nodes = begin((KILLED,), (SLEEP,), link=False, world_size=2)
    nodes.listen()
    nodes.runs[0].go()
    assert nodes.runs[0].statuses() == [-signal.SIGKILL]
    assert until(lambda: not os.path.exists(f"/proc/{nodes.runs[0].watcher}"), LINK_S + 2)


def test_without_a_link_each_node_sees_to_its_own(begin):
    """Nobody listens at the port: a firewall may stand between."""
    nodes = begin((f"time.sleep(1); {ALL_DONE}",), (SLEEP, KILLED), link=False)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        nodes.offer = {"port": nobody.getsockname()[1], "token": "x"}
        nodes.connect(nodes.runs[1])
        nodes.go()
        assert nodes.statuses() == [[0], [-signal.SIGTERM, -signal.SIGKILL]]
    assert nodes.said()[0] == "" and "Rank 2 on host1" in nodes.said()[1]


def test_the_next_address_is_tried(begin):
    nodes = begin((SLEEP,), (KILLED,), link=False)
    nodes.listen()
    nodes.connect(nodes.runs[1], addresses=["240.0.0.1", "127.0.0.1"])
    assert until(lambda: nodes.linked(nodes.runs[0]) == ["Node 1 (host1, rank 1)"])
    assert until(lambda: nodes.linked(nodes.runs[1]) == ["Node 0 (host0, rank 0)"])
    nodes.go()
    assert nodes.statuses() == [[-signal.SIGTERM], [-signal.SIGKILL]] and "Rank 1 on host1" in nodes.said()[0]


def test_who_does_not_know_the_token_is_hung_up_on(begin):
    nodes = begin((f"time.sleep(1); {ALL_DONE}",), (ALL_DONE,), link=False)
    nodes.listen()
    nodes.connect(nodes.runs[1], token="0" * 32)
    rank_fails = {"event": "failure", "what": "failed", "distance": 0, "cause": "failed", "who": "Rank 1", "by": 1}
    for words in ([{"event": "hello"}, rank_fails], [rank_fails], [{"event": "hello", "token": None}], ["hello"], [[]], None):
        with socket.create_connection(("127.0.0.1", nodes.offer["port"]), timeout=5) as stranger:
            lines = b"GET / HTTP/1.1\r\n\r\n" if words is None else b"".join(json.dumps(w).encode() + b"\n" for w in words)
            stranger.sendall(lines)
            try:
                assert stranger.recv(100) == b""
            except ConnectionResetError:
                pass
    nodes.go()
    assert nodes.statuses() == [[0], [0]] and nodes.said() == ["", ""]


# ------------------------------------------------------------------------------------------------ heartbeats


@pytest.fixture
def middle(monkeypatch):
    """A watcher's links with short times, in this process, and one other that has introduced itself."""
    for name, seconds in (("HEARTBEAT_S", 0.1), ("SUSPECT_S", 0.3), ("SILENT_S", 0.8), ("CONNECT_S", 0.3)):
        monkeypatch.setattr(watch_link, name, seconds)
    lost, heard = [], []
    with selectors.DefaultSelector() as selector:
        links = Links(
            selector,
            lambda: {"node": 0, "host": "a", "ranks": [0]},
            lambda peer, message: heard.append(message),
            lambda peer, cause: lost.append(f"{peer.name} {cause}"),
        )
        offer = links.listen()

        def turn(seconds, say=None):
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                if say:
                    other.sendall(say)
                for key, _ in selector.select(0.05):
                    key.data()
                links.look()

        with socket.create_connection(("127.0.0.1", offer["port"])) as other:
            hello = {"event": "hello", "token": offer["token"], "node": 1, "host": "b", "ranks": [2, 1]}
            other.sendall(json.dumps(hello).encode() + b"\n")
            turn(0.2)
            yield links, other, turn, lost, heard, offer
        links.close()


def test_a_silent_node_is_suspected_and_then_lost(middle):
    links, _, turn, lost, _, _ = middle
    assert [peer.name for peer in links.others()] == ["Node 1 (b, ranks 1, 2)"] and not links.suspects()
    turn(0.4)
    assert len(links.suspects()) == 1 and not lost
    turn(0.5)
    assert lost == ["Node 1 (b, ranks 1, 2) has not answered for 1 s (the host is down, or the network between is cut)"]
    assert not links.others()


def test_heartbeats_keep_a_node_and_are_sent(middle):
    links, other, turn, lost, heard, _ = middle
    turn(1.2, b'{"event": "alive"}\n')
    assert not lost and not links.suspects() and [message["event"] for message in heard] == ["hello"]
    other.setblocking(False)
    words = [json.loads(line)["event"] for line in other.recv(1 << 16).splitlines()]
    assert words[0] == "hello" and words.count("alive") >= 5


@pytest.mark.parametrize("word", ("done", "bye"))
def test_the_silence_and_the_end_of_a_node_that_is_done_mean_nothing(middle, word):
    links, other, turn, lost, _, _ = middle
    turn(0.2, json.dumps({"event": word}).encode() + b"\n")
    turn(1.0)
    assert not links.others() and not lost
    other.close()
    turn(0.2)
    assert not lost


def test_a_stop_of_one_s_own_is_not_the_others_silence(middle):
    links, _, turn, lost, _, _ = middle
    time.sleep(1)  # as if the host had been suspended
    links.look()
    assert not lost
    turn(1.0)
    assert len(lost) == 1  # but it is silent indeed


def test_strangers_are_not_waited_for(middle):
    _, _, turn, lost, _, offer = middle
    with socket.create_connection(("127.0.0.1", offer["port"]), timeout=5) as stranger:
        turn(0.6, b'{"event": "alive"}\n')
        assert stranger.recv(10) == b"" and not lost


def test_words_that_do_not_fit_are_sent_later(middle):
    """A long traceback towards a network that is slow."""
    links, other, turn, lost, _, _ = middle
    (peer,) = links.others()
    peer.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    peer.send(event="failure", traceback="x" * 3_000_000)
    assert not peer.flush()
    other.settimeout(5)
    received = b""
    while not (b"failure" in received and received.count(b"x") == 3_000_000 and received.endswith(b"\n")):
        received += other.recv(1 << 20)
        turn(0.01, b'{"event": "alive"}\n')
    assert not lost
