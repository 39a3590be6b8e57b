"""After every test: no process of any run it started is left."""

import pytest
from running import nothing_left_behind  # noqa: F401  for every test in this folder


@pytest.fixture
def free_port():
    """A port that nobody listens on now and that the kernel does not hand out meanwhile."""
    from common.ports import PortReservation

    with PortReservation(0) as port:
        yield port
