"""--debug: what is set, what is left as it was, and that nothing but the flag does it."""

import faulthandler
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.command_line import parse_config
from common.debugging import CHOSEN, VARIABLES, chosen, switch_on

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def handlers():
    """pytest has a fault handler of its own."""
    yield
    if hasattr(faulthandler, "unregister"):
        faulthandler.unregister(signal.SIGUSR1)


def test_what_is_not_set_is_set_and_told():
    environment = {"NCCL_DEBUG": "WARN", "TORCH_CPP_LOG_LEVEL": "", "HOME": "/"}
    switch_on(environment)
    assert environment == {
        "NCCL_DEBUG": "WARN",
        "TORCH_CPP_LOG_LEVEL": "",
        "HOME": "/",
        "TORCH_DISTRIBUTED_DEBUG": "INFO",
        "TORCH_SHOW_CPP_STACKTRACES": "1",
        "PYTHONFAULTHANDLER": "1",
        CHOSEN: "TORCH_DISTRIBUTED_DEBUG,TORCH_SHOW_CPP_STACKTRACES,PYTHONFAULTHANDLER",
    }
    assert chosen(environment) == (
        "--debug set TORCH_DISTRIBUTED_DEBUG=INFO, TORCH_SHOW_CPP_STACKTRACES=1, PYTHONFAULTHANDLER=1; it left "
        "TORCH_CPP_LOG_LEVEL=, NCCL_DEBUG=WARN"
    )


def test_a_rank_finds_what_its_launcher_has_set():
    environment = {"NCCL_DEBUG": "WARN"}
    switch_on(environment)
    before = dict(environment)
    switch_on(environment)
    assert environment == before and "it left NCCL_DEBUG=WARN" in chosen(environment)
    everything = {name: "mine" for name in VARIABLES}
    switch_on(everything)
    assert chosen(everything).startswith("--debug set nothing; it left TORCH_DISTRIBUTED_DEBUG=mine, ")


def test_no_variable_switches_it_on():
    """DEBUG is many programs' variable, with values of all kinds."""
    for value in ("1", "app:*", "true"):
        assert parse_config("test.py", "", (), [], {"DEBUG": value}).debug is False
    code = (
        "import os; from common.command_line import parse_config; import sys; parse_config('t', '', (), sys.argv[1:], {}); "
        "assert 'torch' not in sys.modules; print(os.environ.get('TORCH_CPP_LOG_LEVEL'))"
    )
    for flags, found in (([], "None\n"), (["--debug"], "INFO\n")):
        done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.stdout == found, done
