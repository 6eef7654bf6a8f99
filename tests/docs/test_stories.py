"""The guides' stories, run as they are written: from texts to a sample, fine-tuned, exported and imported again."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest

from nsphere import cli, norms

DOCS = Path(__file__).parents[2] / "docs"
STORIES = ("training.md", "fine-tuning.md", "own-norm.md")
"""In the order in which their reader comes by: the second goes on with the first one's run."""


def commands(page: str) -> list[list[str]]:
    text = "".join(re.findall(r"^<!-- run -->\n```console\n(.*?)^```", (DOCS / page).read_text(), re.S | re.M))
    lines = re.findall(r"^\$ nsphere (.*)$", text.replace("\\\n", " "), re.M)
    return [shlex.split(line, comments=True) for line in lines]


def call(words: list[str]) -> str:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    assert code == 0, f"nsphere {shlex.join(words)}: {err.getvalue()}"
    return out.getvalue()


def losses(run: str) -> list[float]:
    lines = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_the_stories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(norms, "_NORMS", dict(norms._NORMS))
    for folder, pages in (("my_texts", sorted(DOCS.glob("*.md"))[:8]), ("more_texts", sorted(DOCS.glob("*.md"))[8:])):
        Path(folder).mkdir()
        for page in pages:
            Path(folder, page.name).write_text(page.read_text())
    code = re.search(r"```python\n(# my_norms.py\n.*?)```", (DOCS / "own-norm.md").read_text(), re.S)
    assert code and sum(line.strip() != "" for line in code[1].splitlines()) < 15, "a norm of one's own is short"
    Path("my_norms.py").write_text(code[1])

    said = {page: [call(words) for words in commands(page)] for page in STORIES}

    trained, tuned = losses("runs/first"), losses("runs/tuned")
    assert trained[-1] < 0.9 * trained[0], "it learns"
    assert tuned[0] < 0.9 * trained[0], "it goes on from what was learned"
    sample = said["training.md"][1]
    assert sample.startswith("The ") and len(sample) > 20
    before, after = (loss_in_context(table) for table in said["fine-tuning.md"][2:4])
    assert after < before, "fine-tuning helps on the new data"
    assert losses("runs/tuned-again")[0] == pytest.approx(tuned[0], rel=1e-4), "the import is the same model"
    assert Path("runs/p/checkpoints").is_dir() and said["own-norm.md"][1].startswith("def ")


def loss_in_context(table: str) -> float:
    """The loss at the trained context, of the table that nsphere eval prints."""
    found = re.search(r"\(trained\)\s+[\d,]+\s+([\d.]+)", table)
    assert found, table
    return float(found[1])


def test_there_is_something_to_run() -> None:
    assert [len(commands(page)) for page in STORIES] == [2, 8, 2]
