"""Classes of the user's own: ``package.module:Name`` on the command line becomes an object."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from common.errors import UsageError, one_line


def load_class(flag: str, path: str) -> Callable[..., Any]:
    """The class (or function) that ``package.module:Name`` names; modules of the current folder are found too.

    Raises:
        UsageError: it cannot be imported, or the module has no such name.
    """
    module_name, _, name = path.partition(":")
    if module_name == "__main__":
        raise UsageError(
            f"{flag} {path}: ranks cannot import what a notebook's cell or a script has defined; write the class into a file "
            f"(in a notebook: %%writefile my_module.py) and give my_module:{name}"
        )
    if "" not in sys.path:
        sys.path.append("")  # the folder that the user is in
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(
            f"{flag} {path}: {module_name} cannot be imported ({one_line(error)}); give package.module:Name that can be "
            "imported from the folder you are in"
        ) from None
    found = getattr(module, name, None)
    if not callable(found):
        own = [n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module.__name__]
        has = f"it has {', '.join(own)}" if own else "it has no class"
        raise UsageError(f"{flag} {path}: {module_name} has no class {name}; {has}")
    return found  # type: ignore[no-any-return]


def accepted(made: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``offered`` that ``made`` has parameters for."""
    try:
        parameters = inspect.signature(made).parameters
    except (TypeError, ValueError):
        return {}
    return {name: value for name, value in offered.items() if name in parameters}


def build(flag: str, path: str, made: Callable[..., Any], offered: Mapping[str, Any]) -> Any:
    """Calls ``made`` with what it accepts of ``offered``.

    Raises:
        UsageError: it cannot be made from these.
    """
    arguments = accepted(made, offered)
    try:
        return made(**arguments)
    except Exception as error:
        given = ", ".join(f"{n}={v!r}" for n, v in arguments.items())
        raise UsageError(
            f"{flag} {path}: {getattr(made, '__name__', path)}({given}) cannot be made ({one_line(error)}); "
            f"give its parameters defaults, or name them after {', '.join(offered)}"
        ) from None
