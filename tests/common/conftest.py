"""What all unit tests share: hypothesis without a clock, tests that need CUDA left out where there is none."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("launchlab", max_examples=40, deadline=None, database=None, derandomize=True)
settings.load_profile("launchlab")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch, tmp_path):
    """No .env and no variable of ours: each test sets what it needs, in a folder of its own."""
    from common.config import FIELDS

    for name in [*(field.upper() for field in FIELDS), "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
