"""The rule of conftest.py that turns a skip into a failure."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import sys
import pytest

def test_passes():
    pass

def test_skips():
    pytest.skip("no tool here")

@pytest.mark.skipif(True, reason="no other tool here")
def test_skipped_by_a_mark():
    pass

@pytest.mark.gpu
def test_needs_a_gpu():
    pytest.skip("no GPU here")

@pytest.mark.only_on("another system")
def test_of_another_system():
    raise AssertionError("this must not run here")

@pytest.mark.only_on(sys.platform)
def test_of_this_system():
    pass

@pytest.mark.only_on(sys.platform)
def test_of_this_system_that_skips():
    pytest.skip("no third tool here")
"""


def outcome(folder, require_all):
    (folder / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\naddopts = --strict-markers\n")
    (folder / "test_some.py").write_text(TESTS)
    (folder / "test_whole.py").write_text('import pytest\npytest.importorskip("a_module_that_is_nowhere")\ndef test_it(): pass\n')
    env = {name: value for name, value in os.environ.items() if name not in ("LAUNCHLAB_REQUIRE_ALL", "PYTEST_ADDOPTS")}
    env["COLUMNS"] = "200"
    env |= {"LAUNCHLAB_REQUIRE_ALL": "1"} if require_all else {}
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout


def test_a_skip_is_a_skip_by_default(tmp_path):
    status, out = outcome(tmp_path, require_all=False)
    assert status == 0, out
    assert "2 passed, 6 skipped" in out


@pytest.mark.parametrize("name", ["test_skips", "test_skipped_by_a_mark", "test_of_this_system_that_skips"])
def test_a_skip_fails_where_everything_must_be_there(tmp_path, name):
    (tmp_path / "one").mkdir()
    status, out = outcome(tmp_path / "one", require_all=True)
    assert status != 0
    assert re.search(rf"^(FAILED|ERROR) test_some.py::{name} .*1 allows no skip", out, re.MULTILINE), out


def test_a_skipped_file_fails_too(tmp_path):
    status, out = outcome(tmp_path, require_all=True)
    assert status != 0
    assert "ERROR test_whole.py" in out and "a_module_that_is_nowhere" in out


def test_gpu_and_another_system_may_always_skip(tmp_path):
    _, out = outcome(tmp_path, require_all=True)
    assert "test_needs_a_gpu" not in out and "test_of_another_system" not in out
    assert out.count("no GPU here") == 1 and out.count("for another system") == 1
