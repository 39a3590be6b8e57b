"""The notebooks' helper, and what is committed of the notebooks."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LIMIT_BYTES = 300_000
# Folders of a machine, in text: not …/error.json, not a fraction, not an address's path.
MACHINE_PATH = re.compile(r"(?<![\w.…:/<~])/(?:home|root|tmp|usr|opt|var|work|mnt|srv|etc|Users|private|workspace)/|[A-Z]:\\\\")

sys.path.insert(0, str(ROOT / "notebooks"))
import lab  # noqa: E402


def test_the_repository_is_found_from_the_notebooks_folder_and_from_the_root():
    for folder in (ROOT / "notebooks", ROOT):
        script = "import sys; sys.path.insert(0, sys.argv[1]); import lab, benchmarks.harness.runner, common.rank; print(lab.ROOT)"
        command = [sys.executable, "-c", script, str(ROOT / "notebooks")]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.strip() == str(ROOT)


@pytest.mark.parametrize(
    ("value", "measured", "verdict"),
    [
        (4000, 4100.0, "close: less than 10 % apart"),
        (4000, 1000.0, "4.0 times too high"),
        (2, 5, "2.5 times too low"),
        (4, 4, "exactly right"),
        (0, 2, "2 apart"),
        (1e-3, 1e-15, "about 10^12 times too high"),
        ("conv2", "hidden", "not this time"),
        ("Hidden ", "hidden", "right"),
    ],
)
def test_a_guess_stands_beside_the_answer(value, measured, verdict):
    text = lab.guess("How many?", value).compared(measured, "steps")
    assert text.splitlines()[0] == "How many?"
    assert text.splitlines()[-1].strip() == verdict
    assert "your guess:" in text and "measured:" in text and "steps" in text


def test_a_guess_is_printed_by_check(capsys):
    lab.guess("How many samples/s?", 4000).check(5321.4, "samples/s")
    assert (
        capsys.readouterr().out
        == "How many samples/s?\n  your guess: 4,000 samples/s\n  measured:   5,321 samples/s\n  1.3 times too low\n"
    )


def test_code_leaves_out_docstrings_comments_and_empty_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text(
        '"""Top."""\n\nimport os  # why\n\n\ndef f():\n    """Doc\n    more."""\n    # note\n    return "# not a comment"\n'
    )
    assert lab.code("a.py") == ["import os", "def f():", '    return "# not a comment"']


def test_a_diff_counts_what_is_shared_and_is_safe_html(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("x = 1\nif x < 2:\n    pass\n")
    (tmp_path / "b.py").write_text("x = 1\nif x < 3:\n    pass\n")
    made = lab.diff("a.py", "b.py")
    assert made.shared == 2 and made.sizes == (3, 3)
    assert "-if x < 2:" in repr(made) and "+if x < 3:" in repr(made)
    assert "if x &lt; 3:" in made._repr_html_() and "x < 3" not in made._repr_html_()
    assert lab.diff("a.py", "a.py").shared == 3


def test_every_launcher_file_has_a_drawing():
    for launcher in ("plain", "spawn", "torchrun", "mpi"):
        assert "`-- " in lab.drawing(f"launchers/{launcher}.py")
    assert "RANK=0" in lab.drawing("launchers/torchrun.py")


def test_tidy_takes_out_folders_and_the_host(monkeypatch):
    monkeypatch.setattr(lab.socket, "gethostname", lambda: "box7")
    assert lab.tidy(f"{ROOT}/launchers/x.py") == "launchers/x.py"
    assert (
        lab.tidy("/var/folders/a-b/error.json on box7, 1/2 of tcp://127.0.0.1:80/x")
        == "…/error.json on HOST, 1/2 of tcp://127.0.0.1:80/x"
    )
    assert lab.tidy("SIGTERM,SIGINT") == "SIGTERM,SIGINT"


@pytest.mark.parametrize(
    ("words", "short"),
    [
        ([sys.executable, "launchers/plain.py", "--world_size", "2"], "python launchers/plain.py"),
        ([sys.executable, "-B", "-u", str(ROOT / "launchers/plain.py")], "python launchers/plain.py"),
        (["/usr/bin/mpirun", "-np", "2", sys.executable, "launchers/mpi.py"], "mpirun -np 2 python launchers/mpi.py"),
        (["/usr/bin/hydra_pmi_proxy", "--control-port", "host:123"], "hydra_pmi_proxy"),
        (
            [
                sys.executable,
                str(Path(sys.executable).parent / "torchrun"),
                "--standalone",
                "launchers/torchrun.py",
                "--epochs",
                "1",
            ],
            "torchrun --standalone launchers/torchrun.py",
        ),
        (
            [sys.executable, "-c", "from multiprocessing.spawn import spawn_main; spawn_main(tracker_fd=5)"],
            'python -c "from multiprocessing.spawn import …"',
        ),
    ],
)
def test_a_command_line_is_shortened(words, short):
    assert lab.short_command(words) == short


def made_run():
    def seen(pid, parent, words, first=0.0, **environment):
        return lab.Seen(pid, parent, words, {"HOME": "/home/someone", **environment}, first, 9.0)

    processes = [
        seen(10, 1, ["mpirun", "-np", "2", "python", "launchers/mpi.py"]),
        seen(12, 10, ["python", "launchers/mpi.py"], 2.0, RANK="1"),
        seen(11, 10, ["python", "launchers/mpi.py"], 1.0, RANK="0"),
        seen(13, 11, ["python", "-I", "-S", str(ROOT / "common/watch.py"), "3"]),
    ]
    return lab.Run("mpi", 2, "mpirun …", 1.0, {"pid": 11, "loss_per_step": [1, 0.5]}, "", processes)


def test_a_tree_shows_who_started_whom():
    lines = made_run().tree().splitlines()
    assert lines[0] == "mpirun -np 2 python launchers/mpi.py"
    assert lines[1] == "|-- python launchers/mpi.py    <- a rank"
    assert lines[2].startswith("|   `-- python common/watch.py")
    assert lines[3] == "`-- python launchers/mpi.py    <- a rank"


def test_variables_are_those_that_the_command_did_not_have():
    run = made_run()
    assert [p.pid for p in run.rank_processes()] == [12, 11]
    assert run.variables() == [{"RANK": "0"}, {"RANK": "1"}]
    assert run.loss == [1.0, 0.5]


def test_a_table_aligns_numbers_to_the_right():
    assert lab.table([["a", 1234], ["bc", 5]], ["x", "number"]) == "x   number\n----------\na    1,234\nbc       5"


def test_a_gallery_makes_a_small_picture():
    image = lab.picture(lab.gallery([[[0, 1], [1, 0]]] * 3, [1, 2, 3], columns=2, colours=["red", "green", "blue"]))
    assert image.data.startswith(b"\x89PNG") and len(image.data) < 20_000


def test_run_returns_what_was_printed():
    output, seconds, seen = lab.run([sys.executable, "-c", "print('here')"])
    assert output == "here\n" and seconds > 0 and seen == []


def test_a_failed_command_says_so_with_its_last_output():
    with pytest.raises(RuntimeError, match=r"ended with exit status 3\n(.|\n)*no luck"):
        lab.run([sys.executable, "-c", "import sys; print('no luck', file=sys.stderr); sys.exit(3)"])


def test_a_command_that_does_not_end_is_stopped():
    with pytest.raises(RuntimeError, match="was stopped after 1 s"):
        lab.run([sys.executable, "-c", "import time; time.sleep(60)"], limit_s=1)


def test_a_watched_command_shows_its_processes():
    child = "import time; time.sleep(1.5)"
    parent = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], env=os.environ | {{'RANK': '0'}})"
    _, _, seen = lab.run([sys.executable, "-c", parent], watch=True)
    found = next(p for p in seen if p.words[-1] == child and p.environment.get("RANK") == "0")
    assert found.parent in {p.pid for p in seen} - {found.pid}


@pytest.mark.launch
@pytest.mark.parametrize("launcher", ["plain", "spawn", "torchrun", "mpi"])
def test_a_launch_is_watched_and_measured(launcher):
    run = lab.launch(launcher, 2, "--job random --epochs 40", watch=True)
    assert run.result["world_size"] == 2 and len(run.rank_processes()) == 2
    assert run.tree().count("<- a rank") == 2
    assert str(ROOT) not in run.command and "--epochs 40" in run.command
    zero, one = run.variables()
    if launcher == "spawn":
        assert zero == one == {}
    elif launcher == "mpi":
        assert zero and zero != one
    else:
        assert (zero["RANK"], one["RANK"], zero["WORLD_SIZE"]) == ("0", "1", "2")
    assert not MACHINE_PATH.search(json.dumps([run.tree(), zero, one]))


@pytest.mark.launch
def test_a_launch_that_is_refused_raises():
    with pytest.raises(RuntimeError, match="exit status 2\n(.|\n)*epochs"):
        lab.launch("plain", flags="--epochs -1")


def test_there_are_two_notebooks_at_least():
    assert [path.name for path in NOTEBOOKS][:2] == ["01_one_process.ipynb", "02_four_launchers.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_run_small_and_clean(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < LIMIT_BYTES
    book = json.loads(text)
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom, then save"
    for cell in cells:
        source, outputs = "".join(cell["source"]), cell["outputs"]
        assert outputs or cell is cells[0], f"no output: {source[:60]}"
        for output in outputs:
            assert output["output_type"] != "error" and output.get("name") != "stderr", source
            shown = json.dumps({k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}, ensure_ascii=False)
            shown += "".join(output.get("text", []))
            assert not MACHINE_PATH.search(shown), shown
            assert not re.search(r"Traceback|Warning\b", shown), shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_answer_comes_after_a_guess(path):
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    for cell in cells[1:]:
        source = "".join(cell["source"])
        assert "guess(" in source and ".check(" in source.partition("guess(")[2], source[:80]
        assert "your guess:" in json.dumps(cell["outputs"]), source[:80]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_forks_or_spawns_in_the_kernel(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    for word in ("multiprocessing", "os.fork", "subprocess", "init_process_group", "num_workers", "!python", "%run"):
        assert word not in source
