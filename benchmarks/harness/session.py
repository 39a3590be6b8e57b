"""Carrying out a list of runs: one after the other, shown as they go, kept whatever happens."""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.harness.cases import Case, command, shown
from benchmarks.harness.runner import Outcome, Running
from common import now
from common.errors import RunError


@dataclass(frozen=True)
class Job:
    """One run that is to be made."""

    case: Case
    role: str
    """timed, baseline (one process, all threads), fp64, fp64 reference, reference, control, batch; of anatomy.py timed,
    inspection, scaling."""
    flags: tuple[str, ...]
    repeat: int = 0
    label: str = ""
    beside: str = ""
    """Neighbours in a list of jobs that share this name are run at once; empty: on its own."""


def interleaved(cases: Sequence[Case], repeats: int, flags: Callable[[Any, int], tuple[str, ...]]) -> list[Job]:
    """Timed runs of every case, ``repeats`` times over, the order turned round every time; ``flags`` of (case, repeat)."""
    jobs: list[Job] = []
    for repeat in range(repeats):
        round_ = [Job(case, "timed", flags(case, repeat), repeat, f"repeat {repeat + 1} of {repeats}") for case in cases]
        jobs += round_ if repeat % 2 == 0 else round_[::-1]
    return jobs


@dataclass
class Sample:
    """One run that was made."""

    job: Job
    command: str
    wall_seconds: float
    result: dict[str, Any] | None
    failure: str | None = None

    @property
    def leave_seconds(self) -> float | None:
        """From the end of the training to the command's end."""
        if self.result is None or None in (self.result.get("launch_seconds"), self.result.get("train_seconds")):
            return None
        return max(0.0, self.wall_seconds - float(self.result["launch_seconds"]) - float(self.result["train_seconds"]))

    def value(self, name: str) -> float | None:
        """A figure of the run by its name in the result, or ``wall_seconds`` or ``leave_seconds``."""
        if self.result is None:
            return None
        if name in ("wall_seconds", "leave_seconds"):
            return getattr(self, name)  # type: ignore[no-any-return]
        found = self.result.get(name)
        if isinstance(found, list):
            found = found[-1] if found else None
        return None if found is None else float(found)

    def as_json(self) -> dict[str, Any]:
        """For a result file: raw."""
        return {
            "launcher": self.job.case.launcher,
            "variant": self.job.case.variant,
            "world_size": self.job.case.world_size,
            "threads": self.job.case.threads,
            "role": self.job.role,
            "repeat": self.job.repeat,
            "label": self.job.label,
            "command": self.command,
            "wall_seconds": self.wall_seconds,
            "leave_seconds": self.leave_seconds,
            "failure": self.failure,
            "result": self.result,
        }


@dataclass(frozen=True)
class Start:
    """How a run is started."""

    words: list[str]
    variables: Mapping[str, str | None]
    typed: str
    """The command as a person would type it."""
    cwd: Path = field(default_factory=Path.cwd)
    """The user's own folder: classes and data are looked for there."""


def start_launcher(job: Job, folder: Path) -> Start:
    """A launcher of this project, which writes its result into ``folder``."""
    words, variables = command(job.case, list(job.flags))
    return Start([*words, "--result", str(folder / "result.json")], variables, shown(words))


def read_launcher(job: Job, folder: Path, started: float) -> dict[str, Any]:
    """What a launcher wrote into ``folder``.

    Raises:
        RunError: nothing.
    """
    try:
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        raise RunError("wrote no result") from None
    return result


def _what(job: Job) -> str:
    return f"{job.case.name}, {job.label or job.role}"


def _batches(jobs: Sequence[Job], together: int) -> Iterator[Sequence[Job]]:
    """The jobs that are run at once, in order."""
    for name, neighbours in itertools.groupby(jobs, lambda job: job.beside):
        same = list(neighbours)
        size = len(same) if name else together
        yield from (same[first : first + size] for first in range(0, len(same), size))


@dataclass
class Session:
    """Makes runs and keeps what they gave."""

    console: Console
    limit_s: float
    start: Callable[[Job, Path], Start] = start_launcher
    """How to start a job; its files belong into the folder given."""
    read: Callable[[Job, Path, float], dict[str, Any]] = read_launcher
    """What a good run gave, from that folder and the time of its start (``common.now``); RunError if it is not as it should be."""
    attend: Callable[[Job, Path, Running], dict[str, Any]] | None = None
    """Instead of awaiting its end: is there while the run goes on, and gives what it found; then the run is stopped."""
    samples: list[Sample] = field(default_factory=list)

    def carry_out(self, jobs: Sequence[Job], together: int = 1) -> None:
        """Makes the runs in order, ``together`` at a time (more than one only where no time is measured), or as jobs say.

        A KeyboardInterrupt ends the runs in progress with all their processes, and is raised on.
        """
        with tempfile.TemporaryDirectory(prefix="launchlab-") as folder, self._progress(jobs) as advance:
            number = 0
            for at_once in _batches(jobs, together):
                running: list[tuple[Job, Start, Path, float, Running]] = []
                try:
                    for job in at_once:
                        number += 1
                        own = Path(folder, str(number))
                        own.mkdir()
                        start = self.start(job, own)
                        advance(job, done=False)
                        began = now()
                        running.append((job, start, own, began, Running(start.words, self.limit_s, start.variables, start.cwd)))
                    for job, start, own, began, process in running:
                        if self.attend:
                            sample = self._attended(job, start, own, process, self.attend)
                        else:
                            sample = self._sample(job, start, own, began, process.wait())
                        self.samples.append(sample)
                        advance(job, done=True, sample=sample)
                finally:
                    for *_, process in running:
                        process.kill()

    @contextmanager
    def _progress(self, jobs: Sequence[Job]) -> Iterator[Any]:
        """Shows a bar with what is running and the time left; on what is no terminal, a line a run."""
        began, ended, total = time.monotonic(), 0, len(jobs)
        width = max((len(_what(job)) for job in jobs), default=0)
        interactive = self.console.is_terminal
        bar = Progress(
            TextColumn("{task.description}", table_column=None),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            transient=True,
            disable=not interactive,
        )

        def advance(job: Job, done: bool, sample: Sample | None = None) -> None:
            nonlocal ended
            ended += done
            left = (time.monotonic() - began) / ended * (total - ended) if ended else None
            ahead = f"about {left / 60:.0f} min left" if left and left > 90 else f"about {left:.0f} s left" if left else ""
            what = f"{_what(job):<{width}}"
            bar.update(task, description=what, completed=ended, left=ahead)
            if sample and (sample.failure or not interactive):
                how = "FAILED" if sample.failure else f"{sample.wall_seconds:5.1f} s"
                self.console.print(f"[{ended}/{total}] {what} {how}  {ahead}", markup=False, highlight=False)

        with bar:
            task = bar.add_task("", total=total, left="")
            yield advance

    def of(self, role: str, case: Case | None = None) -> list[Sample]:
        """The good runs of a role (and case)."""
        return [s for s in self.samples if s.job.role == role and s.result is not None and case in (None, s.job.case)]

    @property
    def failures(self) -> list[Sample]:
        """The runs that went wrong."""
        return [s for s in self.samples if s.failure]

    def _attended(
        self, job: Job, start: Start, folder: Path, process: Running, attend: Callable[[Job, Path, Running], dict[str, Any]]
    ) -> Sample:
        began = now()
        try:
            result = attend(job, folder, process)
        except RunError as reason:
            process.kill()
            failure = f"{job.case.name} ({job.label or job.role}) {reason}\n{process.wait().tail()}"
            return Sample(job, start.typed, now() - began, None, failure)
        process.kill()
        process.wait()
        return Sample(job, start.typed, now() - began, result)

    def _sample(self, job: Job, start: Start, folder: Path, began: float, outcome: Outcome) -> Sample:
        if outcome.timed_out:
            reason = f"did not end within {outcome.seconds:.0f} s and was stopped (--time_limit)"
        elif outcome.status:
            reason = f"ended with exit status {outcome.status}"
        elif outcome.left_behind:
            reason = "left processes behind: " + "; ".join(outcome.left_behind)
        else:
            try:
                return Sample(job, start.typed, outcome.seconds, self.read(job, folder, began))
            except RunError as error:
                reason = str(error)
        failure = f"{job.case.name} ({job.label or job.role}) {reason}\n{outcome.tail()}"
        return Sample(job, start.typed, outcome.seconds, None, failure)
