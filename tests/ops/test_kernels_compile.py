"""One case of each kernel compiles ahead of time for every architecture, and uses neither stack nor local memory."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the triton package is not installed")
def test_kernels_compile_without_spilling(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, SCRIPT, "--short"], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    for op in ("normalized_update", "qk_norm_rope"):
        assert f"{op} forward" in run.stdout and f"{op} backward" in run.stdout
    assert all(f"sm_{arch} reg" in run.stdout for arch in (80, 90, 100))
    assert "sphere_adamw rows" in run.stdout and "normalize_matrices columns" in run.stdout
