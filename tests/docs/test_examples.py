"""Every example runs as its reader would run it, for two steps instead of hundreds."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
SAYS = {
    "qk_norm_in_your_model.py": "rms, lr 0.003: step 2, loss ",
    "train_ngpt.py": "step 2, loss ",
    "vit_on_the_hypersphere.py": "fresh images right: ",
}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda p: p.name)
def test_it_runs(script: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(script), "--steps", "2"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert SAYS[script.name] in ran.stdout


def test_each_is_checked() -> None:
    assert {script.name for script in EXAMPLES} == set(SAYS)
