"""What the notebooks need and need not show: launchers as subprocesses with a time limit, guesses, differences, pictures.

Nothing forks or spawns in the notebook's kernel: every rank is a process of a command that ``benchmarks.harness.runner`` starts.
"""

from __future__ import annotations

import ast
import difflib
import html
import io
import json
import math
import multiprocessing
import os
import re
import shlex
import socket
import statistics
import sys
import tempfile
import threading
import time
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import psutil

from benchmarks.harness import cases
from benchmarks.harness.cases import Case, command, shown
from benchmarks.harness.runner import Running

if TYPE_CHECKING:
    from IPython.display import Image
    from matplotlib.figure import Figure

LIMIT_S = 300.0  # of one command; generous, for a machine that has other things to do
EVERY_S = 0.25  # between two looks at a run's processes
WATCHER = Path("common", "watch.py")
OURS = ("LAUNCHLAB_RUN", "PYTHONUNBUFFERED")  # set by the runner, for every command alike
START_METHODS = [method for method in cases.START_METHODS if method in multiprocessing.get_all_start_methods()]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ------------------------------------------------------------------------------------------------------ guesses


@dataclass(frozen=True)
class Guess:
    """What the learner expects before the answer is there."""

    question: str
    value: Any

    def check(self, measured: Any, unit: str = "") -> None:
        """Prints the guess beside what was measured."""
        print(self.compared(measured, unit))

    def compared(self, measured: Any, unit: str = "") -> str:
        """The question, the guess, the answer; for numbers also how far apart they are."""
        unit = f" {unit}" if unit else ""
        lines = [self.question, f"  your guess: {_number(self.value)}{unit}", f"  measured:   {_number(measured)}{unit}"]
        if _is_number(self.value) and _is_number(measured):
            lines.append(f"  {_apart(float(self.value), float(measured))}")
        else:
            lines.append("  right" if str(self.value).strip().lower() == str(measured).strip().lower() else "  not this time")
        return "\n".join(lines)


def guess(question: str, value: Any) -> Guess:
    """A guess: put your own in place of ``value``, then run the cell."""
    return Guess(question, value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> str:
    if not _is_number(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _apart(guessed: float, measured: float) -> str:
    if guessed == measured:
        return "exactly right"
    if guessed > 0 and measured > 0:
        factor = max(guessed / measured, measured / guessed)
        if factor < 1.1:
            return "close: less than 10 % apart"
        times = f"{factor:,.1f}" if factor < 10_000 else f"about 10^{math.log10(factor):.0f}"
        return f"{times} times too {'high' if guessed > measured else 'low'}"
    return f"{abs(guessed - measured):.3g} apart"


# --------------------------------------------------------------------------------------------------------- runs


@dataclass
class Seen:
    """One process of a run, as it was when last looked at."""

    pid: int
    parent: int
    words: list[str]
    environment: dict[str, str]
    first: float
    last: float


@dataclass
class Run:
    """A launcher's command that ended well."""

    launcher: str
    ranks: int
    command: str
    """As typed in the repository's root."""
    seconds: float
    result: dict[str, Any]
    """What rank 0 wrote with --result."""
    output: str
    processes: list[Seen] = field(default_factory=list)
    """Those that were there while all ranks were; filled where the run was watched."""

    @property
    def loss(self) -> list[float]:
        """Of each step's global batch."""
        return [float(value) for value in self.result["loss_per_step"]]

    def rank_processes(self) -> list[Seen]:
        """The ranks' processes: rank 0, and its siblings with the same command line (numbers aside)."""
        zero = next(p for p in self.processes if p.pid == self.result["pid"])
        kind = _without_numbers(zero.words)
        return [p for p in self.processes if p.parent == zero.parent and _without_numbers(p.words) == kind]

    def tree(self) -> str:
        """Who started whom, as text."""
        ranks = {p.pid for p in self.rank_processes()}
        known = {p.pid for p in self.processes}
        lines: list[str] = []

        def add(process: Seen, before: str, last: bool, top: bool) -> None:
            children = sorted((p for p in self.processes if p.parent == process.pid), key=lambda p: p.first)
            note = "    <- a rank" if process.pid in ranks else ""
            branch = "" if top else ("`-- " if last else "|-- ")
            lines.append(f"{before}{branch}{short_command(process.words)}{note}")
            below = before if top else before + ("    " if last else "|   ")
            for child in children:
                add(child, below, child is children[-1], top=False)

        for root in (p for p in self.processes if p.parent not in known):
            add(root, "", last=True, top=True)
        return "\n".join(lines)

    def variables(self) -> list[dict[str, str]]:
        """For each rank what its environment has, or has otherwise, than the one that the command was started with.

        Values that belong to this machine or run (folders, host names) are shortened.
        """
        known = {p.pid for p in self.processes}
        before = next(p for p in self.processes if p.parent not in known).environment
        changed = [
            {name: tidy(value) for name, value in p.environment.items() if before.get(name) != value and name not in OURS}
            for p in self.rank_processes()
        ]
        return sorted(changed, key=lambda v: [v.get(name, "") for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")])


def launch(
    launcher: str,
    ranks: int = 1,
    flags: str = "",
    threads: int = 1,
    watch: bool = False,
    limit_s: float = LIMIT_S,
    method: str = "",
) -> Run:
    """Trains under a launcher as a user would, with ``threads`` a rank, and reads what it measured.

    Args:
        launcher: plain, spawn, torchrun, mpi or elastic.
        ranks: the world size.
        flags: of the training, as typed.
        threads: a rank.
        watch: also note the processes and their environments while it runs.
        limit_s: seconds after which the run is stopped.
        method: spawn's start method; by default its own choice.

    Raises:
        RuntimeError: it failed, did not end in time or left processes behind; with its last output.
    """
    with tempfile.TemporaryDirectory(prefix="launchlab-") as folder:
        file = Path(folder, "result.json")
        words, variables = command(Case(launcher, ranks, threads, method), shlex.split(flags))
        variables = {n: v for n, v in variables.items() if n != "OMP_NUM_THREADS"}  # what torchrun does about it is a lesson
        typed = shown(words)
        output, seconds, seen = run([*words, "--result", str(file)], variables, typed, watch, limit_s)
        result = json.loads(file.read_text())
    made = Run(launcher, ranks, typed, seconds, result, output, seen)
    if watch:
        together = min(p.last for p in made.rank_processes())
        made.processes = [p for p in seen if p.first <= together <= p.last]
    return made


def seconds_until(runs: Sequence[Run], phase: str) -> float:
    """Seconds from the command's start until the slowest rank had done ``phase`` (of ``common.events``): the runs' median."""
    return statistics.median(float(run.result["phases"][phase]) for run in runs)


def run(
    words: Sequence[str],
    variables: Mapping[str, str | None] | None = None,
    typed: str = "",
    watch: bool = False,
    limit_s: float = LIMIT_S,
) -> tuple[str, float, list[Seen]]:
    """Runs any command in the repository's root; returns its output, seconds, and the processes seen if it was watched.

    Raises:
        RuntimeError: as ``launch``.
    """
    started = Running(words, limit_s, variables, ROOT)
    seen: dict[int, Seen] = {}
    over = threading.Event()
    looker = threading.Thread(target=_look, args=(started, seen, over), daemon=True)
    if watch:
        looker.start()
    try:
        outcome = started.wait()
    finally:
        over.set()
        if watch:
            looker.join()
    if not outcome.ok:
        how = f"was stopped after {limit_s:.0f} s" if outcome.timed_out else f"ended with exit status {outcome.status}"
        if outcome.left_behind:
            how += ", left behind: " + "; ".join(outcome.left_behind)
        raise RuntimeError(f"{typed or shown(list(words))} {how}\n{tidy(outcome.tail())}")
    return outcome.stdout + outcome.stderr, outcome.seconds, list(seen.values())


def _look(started: Running, seen: dict[int, Seen], over: threading.Event) -> None:
    """Notes the run's processes until it is over. A child that has not called exec yet is corrected by the next look."""
    while not over.wait(EVERY_S):
        now = time.monotonic()
        for process in started.members():
            try:
                with process.oneshot():
                    words, environment, parent = process.cmdline(), process.environ(), process.ppid()
            except psutil.Error:
                continue
            old = seen.get(process.pid)
            first, parent = (old.first, old.parent) if old else (now, parent)  # an orphan keeps the parent that started it
            if words:
                seen[process.pid] = Seen(process.pid, parent, words, environment, first, now)


def _without_numbers(words: Sequence[str]) -> str:
    return re.sub(r"\d+", "", " ".join(words))


def short_command(words: Sequence[str]) -> str:
    """A command line in a few words: no folders, no training flags."""
    if any(word.endswith(str(WATCHER)) for word in words):
        return f"python {WATCHER}    (LaunchLab's watcher: ends the rest when a rank dies)"
    name = Path(words[0]).name
    rest = list(words[1:])
    if name.startswith("python"):
        name = "python"
        while rest and re.fullmatch(r"-[^cm]\w*", rest[0]):  # options of the interpreter
            rest.pop(0)
        if rest and Path(rest[0]).parent == Path(sys.executable).parent:  # a program that is a Python script
            name = Path(rest.pop(0)).name
    if rest and rest[0] == "-c":
        return f'{name} -c "{_short_code(rest[1])}"'
    script = next((i for i, word in enumerate(rest) if word.endswith(".py")), -1)
    return " ".join([name, *(_relative(word) for word in rest[: script + 1])])


def _short_code(code: str) -> str:
    found = re.search(r"multiprocessing\.(\w+)", code)
    return f"from multiprocessing.{found[1]} import …" if found else code[:40]


def _relative(word: str) -> str:
    path = Path(word)
    if path.name.startswith("python"):
        return "python"
    if not path.is_absolute():
        return word
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def tidy(text: str) -> str:
    """``text`` without the folders and the name of this machine."""
    text = text.replace(str(ROOT) + os.sep, "")
    text = re.sub(r"(?<![\w.:/])/(?:[\w.+-]+/)+(?=[\w.+-]*)", "…/", text)
    host = socket.gethostname()
    return re.sub(rf"\b{re.escape(host)}\b", "HOST", text) if host else text


# ------------------------------------------------------------------------------------------------------- files


def drawing(path: str) -> str:
    """The picture of who starts whom in a launcher's docstring, read from the file."""
    text = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
    paragraphs = text.split("\n\n")
    return next((p for p in paragraphs if "|-- " in p or "`-- " in p), "")


def code(path: str, spaced: bool = False) -> list[str]:
    """The lines of a Python file without docstrings, comments and empty lines; ``spaced``: one before each function or class."""
    text = (ROOT / path).read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            said = node.body[0]
            for number in range(said.lineno - 1, said.end_lineno or said.lineno):
                lines[number] = ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1]:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    kept: list[str] = []
    for line in lines:
        if line.strip():
            if spaced and kept and line.startswith(("def ", "class ", "if __name__")):
                kept.append("")
            kept.append(line.rstrip())
    return kept


class Diff:
    """The unified difference of two files' code: a notebook shows it in colour, a terminal as text."""

    def __init__(self, old: str, new: str) -> None:
        """Reads both files, paths from the repository's root."""
        first, second = code(old, spaced=True), code(new, spaced=True)
        self.lines = list(difflib.unified_diff(first, second, old, new, n=max(len(first), len(second)), lineterm=""))
        self.lines = [line for line in self.lines if not line.startswith("@@")]
        self.sizes = sum(map(bool, first)), sum(map(bool, second))
        self.shared = sum(line.startswith(" ") and line != " " for line in self.lines) if self.lines else self.sizes[0]

    def __repr__(self) -> str:
        """As ``diff -u`` prints it."""
        return "\n".join(self.lines)

    def _repr_html_(self) -> str:
        colours = {"-": "#fbe3d6", "+": "#d9eee6"}
        rows = [
            f'<span style="background:{colours[line[0]]};color:#111">{html.escape(line)}</span>'
            if line[:1] in colours
            else html.escape(line)
            for line in self.lines
        ]
        return f'<pre style="line-height:1.35;white-space:pre-wrap">{chr(10).join(rows)}</pre>'


def diff(old: str, new: str) -> Diff:
    """What differs between the code of two files, docstrings and comments left out."""
    return Diff(old, new)


# ------------------------------------------------------------------------------------------------------- showing


def table(rows: Sequence[Sequence[Any]], head: Sequence[str]) -> str:
    """Columns of text; numbers to the right."""
    cells = [list(head), *([_number(cell) for cell in row] for row in rows)]
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(head))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip() for row in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def picture(drawn: Figure) -> Image:
    """A figure as what a notebook shows, small enough to be committed."""
    import PIL.Image
    from IPython.display import Image

    stream = io.BytesIO()
    drawn.savefig(stream, format="png", dpi=90)
    few = PIL.Image.open(stream).convert("RGB").quantize(96)  # colours enough for lines and grey pictures, a third of the bytes
    stream = io.BytesIO()
    few.save(stream, format="png", optimize=True)
    return Image(stream.getvalue(), format="png", width=int(drawn.get_figwidth() * 90))  # type: ignore[no-untyped-call]


def gallery(images: Sequence[Any], titles: Sequence[Any], columns: int, colours: Sequence[str] | None = None) -> Figure:
    """Grey pictures (rows of pixels) in a grid, each with a title, and a frame where there are colours."""
    from common.plots import figure

    rows = -(-len(images) // columns)
    drawn = figure(columns * 0.8, rows * 1.05)
    grid = drawn.subplots(rows, columns, squeeze=False).flat
    for number, axes in enumerate(grid):
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(colours is not None and number < len(images))
        if number < len(images):
            axes.imshow(images[number], cmap="gray_r", aspect="equal")
            axes.set_title(str(titles[number]), fontsize=9)
            if colours is not None:
                axes.spines[:].set(color=colours[number], linewidth=3)
    return drawn
