"""interrupts.py: a Ctrl-C whose exception somebody swallows comes again, and one that is being handled does not."""

import signal
import sys
import time

import pytest

from common.interrupts import AGAIN_S, insistent
from tests.common.helpers import python

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no interval timer")


@pytest.fixture(autouse=True)
def as_before():
    """Signals are handled as before, and no timer runs."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's would be ignored
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)] == [signal.default_int_handler, signal.SIG_DFL]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    signal.signal(signal.SIGINT, before[0])


def swallow():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        pass


def test_a_swallowed_one_comes_again_until_it_is_taken():
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), insistent():
        swallow()
        try:
            time.sleep(10)
        except KeyboardInterrupt:
            pass
        time.sleep(10)
    assert AGAIN_S * 1.9 < time.monotonic() - began < 5


def test_cleaning_up_is_not_interrupted():
    steps = []
    with pytest.raises(KeyboardInterrupt), insistent():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            try:
                raise OSError("while cleaning up")
            except OSError:
                time.sleep(2.5 * AGAIN_S)
            steps.append("cleaned")
    assert steps == ["cleaned"]


def test_another_error_ends_it_too():
    with pytest.raises(ValueError), insistent():
        swallow()
        raise ValueError
    time.sleep(1.5 * AGAIN_S)  # a timer left behind would end this process


def test_a_deaf_process_stays_deaf():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with insistent():
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_what_a_rank_sets_meanwhile_stays():
    with insistent():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


# A compiled module that registers its arrays as sequences while it is imported, interrupted right there.
WHILE_NUMPY_IMPORTS = """
import abc, collections.abc, signal, sys, time
import numpy
from common.endings import watched
from common.errors import exit_status
from common.rank import Rank
signal.signal(signal.SIGINT, signal.default_int_handler)
register, hits = abc.ABCMeta.register, []
def interrupted(cls, subclass):
    if cls is collections.abc.Sequence and not hits:
        hits.append(subclass)
        signal.raise_signal(signal.SIGINT)
    return register(cls, subclass)
def main():
    with watched(Rank("test")):
        abc.ABCMeta.register = interrupted
        import numpy.random
        print("imported after", len(hits), flush=True)
        time.sleep(20)
sys.exit(exit_status(main))
"""


def test_ctrl_c_while_numpy_imports_ends_the_run():
    began = time.monotonic()
    status, out, err = python(WHILE_NUMPY_IMPORTS)
    assert (status, out, err) == (130, "imported after 1\n", ""), (status, out, err)  # it was swallowed
    assert time.monotonic() - began < 10
