"""Carrying out a list of runs: one after the other, shown as they go, kept whatever happens."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.harness.cases import Case, command, shown
from benchmarks.harness.runner import Outcome, Running


@dataclass(frozen=True)
class Job:
    """One run that is to be made."""

    case: Case
    role: str
    """timed, baseline (one process, all threads), fp64, fp64 reference, reference, control, batch."""
    flags: tuple[str, ...]
    repeat: int = 0
    label: str = ""


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
        if self.result is None or self.result.get("launch_seconds") is None:
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


@dataclass
class Session:
    """Makes runs and keeps what they gave."""

    console: Console
    limit_s: float
    samples: list[Sample] = field(default_factory=list)

    def carry_out(self, jobs: Sequence[Job], together: int = 1) -> None:
        """Makes the runs in order, ``together`` at a time (more than one only where no time is measured).

        A KeyboardInterrupt ends the runs in progress with all their processes, and is raised on.
        """
        with tempfile.TemporaryDirectory(prefix="launchlab-") as folder, self._progress(len(jobs)) as advance:
            for start in range(0, len(jobs), together):
                batch = jobs[start : start + together]
                running: list[tuple[Job, Running, Path]] = []
                try:
                    for number, job in enumerate(batch, start):
                        file = Path(folder, f"{number}.json")
                        words, variables = command(job.case, [*job.flags, "--result", str(file)])
                        advance(job, done=False)
                        running.append((job, Running(words, self.limit_s, variables), file))
                    for job, process, file in running:
                        sample = _sample(job, process.wait(), file)
                        self.samples.append(sample)
                        advance(job, done=True, sample=sample)
                finally:
                    for _, process, _ in running:
                        process.kill()

    @contextmanager
    def _progress(self, total: int) -> Iterator[Any]:
        """Shows a bar with what is running and the time left; on what is no terminal, a line a run."""
        began, ended = time.monotonic(), 0
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
            what = f"{job.case.name}, {job.label or job.role}"
            bar.update(task, description=f"{what:<44}", completed=ended, left=ahead)
            if sample and (sample.failure or not interactive):
                how = "FAILED" if sample.failure else f"{sample.wall_seconds:5.1f} s"
                self.console.print(f"[{ended}/{total}] {what:<44} {how}  {ahead}", markup=False, highlight=False)

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


def _sample(job: Job, outcome: Outcome, file: Path) -> Sample:
    result = None
    failure = None
    if outcome.ok and file.is_file():
        result = json.loads(file.read_text())
    else:
        if outcome.timed_out:
            reason = f"did not end within {outcome.seconds:.0f} s and was stopped (--time_limit)"
        elif outcome.status:
            reason = f"ended with exit status {outcome.status}"
        elif outcome.left_behind:
            reason = "left processes behind: " + "; ".join(outcome.left_behind)
        else:
            reason = "wrote no result"
        failure = f"{job.case.name} ({job.label or job.role}) {reason}\n{outcome.tail()}"
    words = [word for word in outcome.command if word not in ("--result", str(file))]
    return Sample(job, shown(words), outcome.seconds, result, failure)
