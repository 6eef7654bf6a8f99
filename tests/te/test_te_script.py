"""A script written for Transformer Engine runs on nsphere.te with nothing changed but what its import finds."""

import runpy
import sys
import types
from pathlib import Path

from nsphere import te

SCRIPT = Path(__file__).with_name("script_for_transformer_engine.py")


def test_a_script_for_transformer_engine_runs_by_changing_its_import(monkeypatch, capsys):
    whole = types.ModuleType("transformer_engine")
    whole.pytorch = te
    monkeypatch.setitem(sys.modules, "transformer_engine", whole)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", te)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.attention", te.attention)
    assert "nsphere" not in "".join(line for line in SCRIPT.read_text().splitlines() if "import" in line)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "104 checks passed" in capsys.readouterr().out
