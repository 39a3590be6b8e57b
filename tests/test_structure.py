"""The shape of the project, read from its files: who imports whom, and what a launcher file may hold."""

import ast
import json
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("common", "launchers", "benchmarks")
SCRIPTS = sorted((ROOT / "benchmarks" / "peer_scripts").glob("*.py"))
LAUNCHERS = sorted(p for p in (ROOT / "launchers").glob("*.py") if p.name != "__init__.py")
ALL = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))


def place(path):
    return path.relative_to(ROOT).as_posix()


def imported(text):
    """Every module that a source imports, wherever in it, also by name; dotted."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are written in full"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant)}
    return found


def tops(path):
    return {name.partition(".")[0] for name in imported(path.read_text(encoding="utf-8"))}


IMPORTS = {place(path): tops(path) for path in ALL}


def users(package):
    return {name for name, packages in IMPORTS.items() if package in packages}


def test_the_scan_sees_the_files():
    assert {"common/loop.py", "common/watch.py", "launchers/mpi.py", "benchmarks/__init__.py"} <= set(IMPORTS)
    assert len(LAUNCHERS) >= 4 and len(IMPORTS) >= 27
    assert "torch" in IMPORTS["common/loop.py"] and "common" in IMPORTS["launchers/plain.py"]
    assert "dotenv" in IMPORTS["common/command_line.py"] and "matplotlib" in IMPORTS["common/plots.py"]  # imported within functions
    assert imported("def f():\n  import a.b as c\n  from d import e\n  __import__('g')\n  x.import_module('h')") == {
        "a.b", "d", "d.e", "g", "h"
    }  # fmt: skip


def test_common_imports_neither_launchers_nor_benchmarks():
    assert {n for n in users("launchers") | users("benchmarks") | users("notebooks") if n.startswith("common/")} == set()


def test_launchers_import_common_and_not_each_other():
    assert all("common" in IMPORTS[place(path)] for path in LAUNCHERS)
    assert {n for n in users("launchers") | users("benchmarks") if n.startswith("launchers/")} == set()


def test_benchmarks_run_launchers_as_subprocesses_only():
    assert {n for n in users("launchers") | users("notebooks") if n.startswith("benchmarks/")} == set()


def imported_in_notebook(text):
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    lines = [[line for line in cell["source"] if not line.lstrip().startswith(("%", "!"))] for cell in cells]
    return {name.partition(".")[0] for cell in lines for name in imported("".join(cell))}


def test_notebooks_run_launchers_as_subprocesses_only():
    cell = {"cell_type": "code", "source": ["%time\n", "import launchers.plain\n", "!ls"]}
    assert imported_in_notebook(json.dumps({"cells": [cell]})) == {"launchers"}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert "launchers" not in imported_in_notebook(path.read_text(encoding="utf-8")), path.name


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        (
            "mpi4py",
            {"launchers/mpi.py", "common/mpi_allreduce.py", "benchmarks/collective_ways.py", "benchmarks/peer_scripts/bare_mpi.py"},
        ),
        ("matplotlib", {"common/plots.py", "benchmarks/harness/plots.py"}),
        ("dotenv", {"common/command_line.py"}),
        ("rich", {"common/console.py", "benchmarks/"}),
        ("psutil", {"benchmarks/harness/"}),
        ("PIL", {"common/plots.py", "common/hub.py", "common/predict.py"}),
        ("filelock", {"common/cache.py"}),
        ("datasets", {"common/hub.py"}),
        ("transformers", {"launchers/hf_trainer.py", "benchmarks/peer_scripts/trainer_loop.py"}),
        ("accelerate", {"launchers/hf_trainer.py", "benchmarks/peer_scripts/accelerate_loop.py"}),
        ("torchrunx", {"benchmarks/peer_scripts/torchrunx_loop.py"}),
        ("ray", {"benchmarks/peer_scripts/ray_loop.py"}),
        ("lightning_fabric", {"benchmarks/peer_scripts/fabric_loop.py"}),
    ],
)
def test_a_package_is_used_only_where_it_belongs(package, allowed):
    assert {n for n in users(package) if not any(n == a or (a.endswith("/") and n.startswith(a)) for a in allowed)} == set()


@pytest.mark.parametrize("path", sorted((ROOT / "common").glob("*.py")), ids=lambda path: path.name)
def test_mpi4py_is_imported_only_where_mpi_is_asked_for(path):
    """Its import joins an MPI world, or fails where there is none."""
    top = ast.parse(path.read_text(encoding="utf-8")).body
    imports = "\n".join(ast.unparse(n) for n in top if isinstance(n, (ast.Import, ast.ImportFrom)))
    assert "common.mpi_allreduce" not in imported(imports)


def test_the_peers_scripts_use_nothing_of_this_project():
    """They measure what a user pays who writes it by hand."""
    scripts = {name: packages for name, packages in IMPORTS.items() if name.startswith("benchmarks/peer_scripts/")}
    assert len(scripts) == 11
    assert {name for name, packages in scripts.items() if packages & set(FOLDERS)} == set()


def test_common_and_launchers_need_nothing_else():
    known = set(sys.stdlib_module_names) | {"common", "torch", "numpy", "mpi4py", "matplotlib", "dotenv", "rich", "PIL", "filelock"}
    known |= {"transformers", "accelerate", "datasets"}  # where, the test above holds
    assert {(n, p) for n, ps in IMPORTS.items() if not n.startswith("benchmarks/") for p in ps - known} == set()


@pytest.mark.parametrize(
    "name", ["watch", "reporter", "ports", "children", "config", "rank", "errors", "files", "events", "training", "warm"]
)
def test_what_a_parent_needs_comes_without_torch(name):
    """A launcher's parent, and the watcher, start quickly: they import no torch, not even through others."""
    seen, waiting = set(), [f"common/{name}.py"]
    while waiting:
        path = waiting.pop()
        if path in seen or not (ROOT / path).is_file():
            continue
        seen.add(path)
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        top = "\n".join(ast.unparse(n) for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)))
        assert not {"torch", "numpy"} & {n.partition(".")[0] for n in imported(top)}, path
        waiting += [n.replace(".", "/") + ".py" for n in imported(top) if n.startswith("common")]
    assert f"common/{name}.py" in seen


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_a_launcher_file_is_short_and_trains_nothing(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110
    names = imported(text)
    assert not any(name.startswith(("torch.optim", "torch.nn", "torch.utils")) for name in names)
    called = {ast.unparse(n.func).split(".")[-1] for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)}
    assert not called & {"backward", "zero_grad", "step", "all_reduce", "DistributedDataParallel", "DataLoader", "SGD"}
    assert ast.get_docstring(ast.parse(text)) and "common.command_line" in names


@pytest.mark.parametrize("path", LAUNCHERS + SCRIPTS, ids=lambda path: path.name)
def test_no_launcher_is_named_after_a_package_or_a_module(path):
    """``python launchers/x.py`` puts launchers/ first on the module path: x would hide a package of that name."""
    assert path.stem not in set(packages_distributions()) | set(sys.stdlib_module_names) | {"common", "mpi4py", "torch"}
