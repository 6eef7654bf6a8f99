"""Tests of the Triton kernels in Triton's interpreter, on a CPU: `TRITON_INTERPRET=1 pytest tests/ops/interpreted`.

The variable must be set before triton is imported, so the rest of the suite runs them in a process of their own
(tests/ops/test_interpreted.py).
"""

import os

import pytest
import torch
from interpreter import patch_once

patch_once()
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel forgets to write is NaN."""
    new_empty, empty_like, empty = torch.Tensor.new_empty, torch.empty_like, torch.empty

    def poison(function):
        def call(*args, **kwargs):
            made = function(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() and not made.is_meta else made

        return call

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(empty_like))
    monkeypatch.setattr(torch, "empty", poison(empty))
