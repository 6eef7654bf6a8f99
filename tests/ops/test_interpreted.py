"""Runs the tests of the kernels where TRITON_INTERPRET=1 was set before triton was imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDERS = [Path(__file__).parent / name for name in ("interpreted", "on_device")]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the triton package is not installed")
@pytest.mark.parametrize(
    "file", sorted(f for folder in FOLDERS for f in folder.glob("test_*.py")), ids=lambda f: f.stem
)
def test_in_the_interpreter(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "540", str(file)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
