"""After every test: no process of any run it started is left."""

import pytest
import running


@pytest.fixture(autouse=True)
def nothing_left_behind():
    running.runs.clear()
    yield
    left = [line for run in running.runs for line in run.close()]
    running.runs.clear()
    assert not left


@pytest.fixture
def free_port():
    """A port that nobody listens on now and that the kernel does not hand out meanwhile."""
    from common.ports import PortReservation

    with PortReservation(0) as port:
        yield port
