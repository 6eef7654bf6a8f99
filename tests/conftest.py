"""One thread a process: the tests run side by side. Tests about threads set their own number."""

import gc
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first: at the end, no worker waits for another."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """What was imported stays: no garbage collection need walk through it, above all not the runs' own full ones."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """What is still there at the end would be called a leak."""
    gc.unfreeze()
