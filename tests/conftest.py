"""Rules for all tests: what is skipped where, and how a session ends."""

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

REQUIRE_ALL = "LAUNCHLAB_REQUIRE_ALL"


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a background job's; children would inherit it and be deaf to Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _end_in_order_when_asked_to()
    config.addinivalue_line("markers", "only_on(platform): runs on this sys.platform only; the one skip that is always allowed")


def _end_in_order_when_asked_to():
    """SIGTERM (a time limit's) ends the session as Ctrl-C does: what the running test has started is ended by its fixtures."""
    session = os.getpid()

    def asked(number, _):
        if os.getpid() == session:
            pytest.exit("ended by SIGTERM", 128 + number)
        signal.signal(number, signal.SIG_DFL)  # a forked child's is its own
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, asked)


def pytest_runtest_setup(item):
    mark = item.get_closest_marker("only_on")
    if mark and sys.platform != mark.args[0]:
        pytest.skip(f"for {mark.args[0]}, this is {sys.platform}")


def _forbid(report, may_skip):
    """With LAUNCHLAB_REQUIRE_ALL=1 what was skipped has failed: a hole in the tests is not to look like a pass."""
    if os.environ.get(REQUIRE_ALL) == "1" and report.skipped and not hasattr(report, "wasxfail") and not may_skip:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{REQUIRE_ALL}=1 allows no skip: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    elsewhere = item.get_closest_marker("only_on")
    _forbid(report, item.get_closest_marker("gpu") or (elsewhere and sys.platform != elsewhere.args[0]))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _forbid(report, False)
    return report


MEMORY = Path("/dev/shm")
# MPICH's, Open MPI's and multiprocessing's; they remove them, unless they are killed, which many tests do.
LEFT_IN_MEMORY = ("mpich_shm_", "sm_segment", "sem.mp-")
_BEFORE = pytest.StashKey[set[Path]]()


def _in_memory():
    return {file for file in MEMORY.glob("*") if file.name.startswith(LEFT_IN_MEMORY)}


def pytest_sessionstart(session):
    session.config.stash[_BEFORE] = _in_memory()


def pytest_sessionfinish(session):
    """Removes what killed ranks have left in memory, 300 MB in all, unless somebody uses it."""
    left = {str(file) for file in _in_memory() - session.config.stash[_BEFORE]}
    for process in psutil.process_iter() if left else ():
        try:
            left -= {mapped.path for mapped in process.memory_maps()}
        except (psutil.Error, OSError):
            pass
    for file in left:
        Path(file).unlink(missing_ok=True)
