"""What a person did that cannot work, said in one line."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable


class UsageError(Exception):
    """Bad input: its text is one line that says what was given, what is allowed and what to do (exit status 2)."""

    def __init__(self, text: str) -> None:
        """``text`` may quote what was given; its line breaks become spaces."""
        super().__init__(" ".join(text.splitlines()))


class RunError(Exception):
    """A run that failed for a reason that its text explains in one line; a traceback would add nothing (exit status 1)."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The error's type and first non-empty line, at most ``limit`` characters."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__)[:limit]


def complain(message: str) -> None:
    """Prints ``message`` to stderr as one line, in one write so that ranks do not interleave."""
    with contextlib.suppress(OSError):
        sys.stderr.flush()
        os.write(2, f"{message}\n".encode(errors="replace"))


def exit_status(main: Callable[[], int | None], speaks: bool = True) -> int:
    """Runs ``main`` and turns what a person can cause into an exit status and one line.

    ``speaks`` is false in the ranks that must not repeat what another says; they wait a moment, so that a launcher
    that ends everybody at the first exit does not end the speaker before it has spoken.

    Returns:
        ``main``'s status (None counts as 0), 2 after a UsageError, 1 after a RunError, 130 after Ctrl-C.
    """
    try:
        return main() or 0
    except UsageError as error:
        if speaks:
            complain(f"error: {error}")
        else:
            time.sleep(2)
        return 2
    except RunError as error:
        complain(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as left:
        if isinstance(left.code, str):  # sys.exit("why")
            complain(left.code)
        return left.code if isinstance(left.code, int) else int(left.code is not None)
