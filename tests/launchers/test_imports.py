"""Nothing is imported before the first step that it does not need, in any process of any launcher."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from running import ALL, SPAWNS, Run, command

pytestmark = [pytest.mark.launch, pytest.mark.only_on("linux")]

PROBE = """
import json, pathlib, sys, time
import torch

class Probe(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(20, 2)
        self.steps = 0

    def forward(self, x):
        self.steps += self.training
        if self.steps == 2:  # the first step is done
            pathlib.Path(f"rank-{torch.distributed.get_rank()}").write_text(json.dumps(sorted(sys.modules)))
            while not pathlib.Path("go").exists():
                time.sleep(0.01)
        return self.layer(x)
"""
# Beyond what torch imports by itself.
NEEDED = {
    "common", "probe", "__mp_main__",
    "cython_runtime", "_cython",  # NumPy's random numbers
    "hmac", "secrets", "_hmac",  # NumPy's seeds
    "ctypes", "_ctypes",  # common.names
    "argparse", "gettext",
    "stringprep", "unicodedata",  # socket's, for any host name
}  # fmt: skip
OF_LAUNCHER = {
    "mpi": {"mpi4py"},
    "spawn": {"launchers"},
    "elastic": {"uuid", "_uuid", "faulthandler"},
}


@functools.cache
def torchs_own():
    """Top-level modules after the imports that any DDP training needs."""
    code = "import json, sys, numpy, torch.distributed, torch.nn.parallel; print(json.dumps(sorted(sys.modules)))"
    return tops(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=120).stdout))


def tops(modules):
    return {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize("launcher", (*ALL, *SPAWNS))
def test_what_is_imported_before_the_first_step_is_done(tmp_path, launcher):
    (tmp_path / "probe.py").write_text(PROBE)
    run = Run(command(launcher, 2, "--job", "random", "--epochs", 1, "--model", "probe:Probe"), cwd=tmp_path)
    ranks = [tmp_path / f"rank-{rank}" for rank in (0, 1)]
    run.until(lambda: all(rank.exists() and rank.stat().st_size for rank in ranks), "both ranks' first step")
    parent = Path(f"/proc/{run.process.pid}/maps").read_text()
    (tmp_path / "go").touch()
    ended = run.finish()
    assert ended.status == 0, str(ended)
    for rank in ranks:
        modules = json.loads(rank.read_text())
        more = {name.rstrip("_0123456789") for name in tops(modules) - torchs_own()}
        assert more <= NEEDED | OF_LAUNCHER.get(launcher.partition(" ")[0], set()), more
        slow = ("torch._dynamo.", "torch._inductor.", "sympy.", "matplotlib.", "rich.", "PIL.", "psutil.", "dotenv.")
        assert not [name for name in modules if name.startswith(slow)]
    # Who only starts ranks needs no torch, except where it is copied or is torchrun's engine.
    assert ("libtorch" in parent) == (launcher in ("torchrun", "elastic", "spawn (fork)")), "the launcher's own process"


def test_spawns_parent_imports_the_standard_library_only():
    words = [sys.executable, "-X", "importtime", "launchers/spawn.py", "--help"]
    ended = Run(words).finish()
    assert ended.status == 0
    modules = {row.rpartition("|")[2].strip() for row in ended.err.splitlines() if row.startswith("import time:")}
    others = tops(modules) - set(sys.stdlib_module_names) - {"imported package"}
    # The environment's own start, and what pickle looks for under Jython.
    assert others - {"_distutils_hack", "sitecustomize", "usercustomize", "org"} == {"common"}, others
    assert not modules & {"difflib", "dotenv", "asyncio", "http", "email", "logging", "xml", "ssl"}
