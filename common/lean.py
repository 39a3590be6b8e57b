"""Starting without the compiler: ``torch._dynamo`` is not needed to train, yet the first optimizer and DDP import it.

They ask it three small questions ("break the graph here", "which DDP mode?", "leave this function alone"), whose answers are known
where nothing is compiled. Importing it for that costs each rank as much as ``import torch`` itself: 0.7 s and 950 modules
(torch 2.13; ``python -X importtime launchers/plain.py``).
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

_NAME = "torch._dynamo"


class _UntilNeeded(ModuleType):
    """Answers for ``torch._dynamo`` while nothing is compiled; gives way to the real one at any other question."""

    def __init__(self) -> None:
        super().__init__(_NAME)
        self.graph_break = lambda *_, **__: None
        self.disable = lambda function, *_, **__: function
        self.utils = SimpleNamespace(get_optimize_ddp_mode=lambda: "ddp_optimizer")
        self.trace_rules = SimpleNamespace(clear_lru_cache=lambda: None)

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(_NAME) is self:
            del sys.modules[_NAME]
            vars(torch).pop("_dynamo", None)
        return getattr(importlib.import_module(_NAME), name)


def spare_the_compiler() -> None:
    """From now on ``torch._dynamo`` is imported when something is compiled, not before; does nothing where it is there already."""
    if _NAME not in sys.modules:
        sys.modules[_NAME] = torch._dynamo = _UntilNeeded()
