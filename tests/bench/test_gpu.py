"""`make gpu`'s script where there is no GPU: its stages exist, run at tiny sizes, and are skipped with a reason."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(os, "environ", dict(os.environ))  # qk.py sets a variable for its own process
    yield importlib.import_module("gpu")
    for name in ("gpu", "qk", "harness"):
        sys.modules.pop(name, None)


def test_every_stage_has_arguments_of_its_module(gpu):
    assert len({stage.name for stage in gpu.STAGES}) == len(gpu.STAGES)
    for stage in gpu.STAGES:
        arguments = importlib.import_module(stage.module).Args
        arguments(**stage.arguments)
        arguments(**stage.tiny)
        assert not stage.warm or "rounds" in arguments.__dataclass_fields__


def test_a_process_that_fails_or_hangs_is_told(gpu, tmp_path):
    for code, limit, state in (
        ("print('done')", 60, "ran"),
        ("raise SystemExit(3)", 60, "failed (exit code 3)"),
        ("import time; print('began', flush=True); time.sleep(60)", 4, "out of time"),
    ):
        outcome = gpu.Process([sys.executable, "-c", code], dict(os.environ), tmp_path / "log").wait(limit)
        assert outcome.state == state
    assert "began" in outcome.output


NOTHING_BUT_TORCH_AND_NUMPY = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in "datasets matplotlib pytest rich safetensors tokenizers transformers tyro".split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.fixture
def bare(tmp_path):
    """The variables of processes that find torch, numpy and little else, as on the machine of `make gpu`."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(NOTHING_BUT_TORCH_AND_NUMPY)
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**variables, "PYTHONPATH": os.pathsep.join([str(tmp_path / "bare"), variables.get("PYTHONPATH", "")])}


def test_every_stage_needs_torch_and_numpy_alone(gpu, bare):
    modules = sorted({stage.module for stage in gpu.STAGES})
    code = f"import sys; sys.path[:0] = [{str(BENCHMARKS)!r}]; import " + ", ".join(modules)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=bare, timeout=300)
    assert run.returncode == 0, run.stderr
    code = "import safetensors"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, env=bare, timeout=60).returncode == 1


def test_a_run_leaves_results_and_reasons(tmp_path, bare):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny", "--out", str(tmp_path)]
    run = subprocess.run(
        [*command, "--only", "optimizer", "1k-triton"], capture_output=True, text=True, env=bare, timeout=500
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["optimizer"]["state"] == "ran"
    assert found["optimizer"]["results"]["results"]["AdamW"]["over_adamw"] == [1, 1, 1]
    assert found["step-0.5b-1k-triton"]["state"].startswith("skipped: ")
    assert "over AdamW" in (tmp_path / "log.txt").read_text()
