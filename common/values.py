"""From text to value: what each kind of flag allows. A converter raises ValueError whose text says what is allowed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable


def whole(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """A converter to an int within [minimum, maximum] that says so when it cannot."""
    allowed = f"a whole number from {minimum} to {maximum}" if maximum is not None else f"a whole number, {minimum} or more"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(allowed) from None
        if value < minimum or (maximum is not None and value > maximum):
            raise ValueError(allowed)
        return value

    return convert


class Nodes(int):
    """The most nodes that a run takes; ``least`` is the fewest with which it goes on."""

    least: int

    def __new__(cls, most: int, least: int | None = None) -> Nodes:
        """``least`` is ``most`` unless it is given."""
        made = super().__new__(cls, most)
        made.least = most if least is None else least
        return made

    def __getnewargs__(self) -> tuple[int, int]:  # type: ignore[override]
        """For pickle."""
        return int(self), self.least


def nodes(text: str) -> Nodes:
    """A number of nodes, or MIN:MAX."""
    least, colon, most = text.partition(":")
    try:
        bounds = [whole(1)(least), whole(1)(most if colon else least)]
    except ValueError:
        bounds = [1, 0]
    if bounds[0] > bounds[1]:
        raise ValueError("a whole number, 1 or more, or two as MIN:MAX")
    return Nodes(bounds[1], bounds[0])


AS_SHIPPED = 0  # threads: as many as the launcher left


def threads(text: str) -> int:
    """Threads of a rank, or ``as_shipped``."""
    if text == "as_shipped":
        return AS_SHIPPED
    try:
        return whole(1, 4096)(text)
    except ValueError as allowed:
        raise ValueError(f"{allowed}, or as_shipped") from None


def positive(text: str) -> float:
    """A finite float above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError("a number above 0")
    return value


def not_negative(text: str) -> float:
    """A finite float, 0 or more."""
    try:
        return positive(text) if float(text) else 0.0
    except ValueError:
        raise ValueError("a number, 0 or more") from None


def seconds(text: str) -> float:
    """Seconds above 0, at most a week: clocks below count in milliseconds and do not take any number."""
    with contextlib.suppress(ValueError):
        if positive(text) <= 604800:
            return float(text)
    raise ValueError("a number of seconds above 0, at most 604800 (a week)")


def one_of(*choices: str) -> Callable[[str], str]:
    """A converter that takes exactly these words."""

    def convert(text: str) -> str:
        if text not in choices:
            import difflib

            near = difflib.get_close_matches(text, choices, n=1)
            raise ValueError(f"one of {', '.join(choices)}" + (f" (did you mean {near[0]}?)" if near else ""))
        return text

    return convert


def part(*builtin: str) -> Callable[[str], str]:
    """A built-in name, or ``package.module:Name`` of a class of the user's own."""

    def convert(text: str) -> str:
        module, colon, name = text.partition(":")
        if text in builtin or (colon and name.isidentifier() and all(p.isidentifier() for p in module.split("."))):
            return text
        raise ValueError(f"one of {', '.join(builtin)}, or package.module:Name of a class of your own")

    return convert


def switch(text: str) -> bool:
    """A yes or no from the environment (on the command line the flag alone means yes)."""
    word = text.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("", "0", "false", "no", "off"):
        return False
    raise ValueError("1 or 0")


def any_text(text: str) -> str:
    """Any text that is not empty."""
    if not text.strip():
        raise ValueError("a text that is not empty")
    return text
