"""The wheel: it builds, has everything it needs and nothing else, and importing it needs torch alone and is quick."""

import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]

IMPORT_ALONE = """
import sys, time

sys.path[:0] = sys.argv[1:3]
import torch
start = time.perf_counter()
import nsphere
print(time.perf_counter() - start)
assert nsphere.__file__.startswith(sys.argv[1]), nsphere.__file__
model = nsphere.NGPT(nsphere.NGPTConfig(vocab_size=16, context=8, d_model=16, num_layers=1, num_heads=2))
tokens = torch.arange(8)[None]
model.loss(tokens, tokens).backward()

from nsphere.cli import main
sys.exit(main(["--help"]))
"""


def torch_alone(folder: Path) -> Path:
    """A folder that has torch and what torch requires, and nothing else: links to what is installed."""
    wanted, seen = ["torch"], set()
    while wanted:
        name = re.match(r"[\w.-]+", wanted.pop())[0].lower()  # type: ignore[index]
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of another platform, or another Python
        wanted += [r for r in found.requires or [] if "extra ==" not in r]
        for top in {file.parts[0] for file in found.files or [] if not file.parts[0].startswith("..")}:
            link = folder / top
            if not link.exists():
                link.symlink_to(found.locate_file(top))  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("nsphere-*.whl"))


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if ".dist-info/" not in n]
    sources = {
        str(p.relative_to(ROOT / "src")) for p in (ROOT / "src" / "nsphere").rglob("*") if p.suffix in (".py", ".cpp")
    }
    assert set(names) == sources | {"nsphere/py.typed"}


def test_the_wheel_needs_torch_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "nsphere")
    (tmp_path / "torch").mkdir()
    torch_only = torch_alone(tmp_path / "torch")
    assert not (torch_only / "numpy").exists() and (torch_only / "torch").exists()
    # -E and -S: neither PYTHONPATH nor the environment's packages
    command = [
        sys.executable,
        "-E",
        "-S",
        "-W",
        "ignore",
        "-c",
        IMPORT_ALONE,
        str(tmp_path / "nsphere"),
        str(torch_only),
    ]
    seconds = []
    for _ in range(3):
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        took, *_, last = ran.stdout.splitlines()
        assert last.startswith("Not installed: numpy, tyro,") and last.endswith("; pip install 'nsphere[train]'")
        seconds.append(float(took))
    assert median(seconds) < 0.3, f"importing nsphere took {seconds} s beyond torch"
