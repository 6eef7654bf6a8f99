"""Every page of the documentation: its Python runs, its commands parse, its links lead somewhere.

A page's Python blocks run in order in one namespace, as its reader would run them. What can't run here is preceded by
`<!-- not run: REASON -->`; commands preceded by `<!-- run -->` are run, not only parsed. A block whose first line is
`# some_name.py` is that file, for the commands that name it.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from nsphere import cli, norms
from nsphere.commands.flags import parse

ROOT = Path(__file__).parents[2]
PAGES = sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n+)?^```(?P<language>\w+)\n(?P<code>.*?)^```", re.S | re.M)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks that are to run, each after as many line breaks as put it on its own line number."""
    text = page.read_text()
    return [
        "\n" * text[: m.start("code")].count("\n") + m["code"]
        for m in BLOCK.finditer(text)
        if m["language"] == language and not m["reason"]
    ]


def commands(page: Path) -> list[list[str]]:
    """Every `$ nsphere …` of a page, in words; a line that ends with a backslash goes on."""
    text = "\n".join(blocks(page, "console")).replace("\\\n", " ")
    lines = re.findall(r"^\$ nsphere (.*)$", text, re.M)
    return [shlex.split(line, comments=True) for line in lines]


def save_files(page: Path) -> None:
    """The files that a page shows, in the working directory."""
    for code in blocks(page, "python"):
        if found := re.match(r"# (\w+\.py)\n", code.lstrip("\n")):
            Path(found[1]).write_text(code)


WITH_PYTHON = [p for p in PAGES if blocks(p, "python")]
WITH_COMMANDS = [p for p in [*PAGES, ROOT / "README.md"] if commands(p)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT's
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_the_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(norms, "_NORMS", dict(norms._NORMS))  # a page's norm of one's own goes with the page
    torch.manual_seed(0)
    namespace: dict = {"__name__": "__main__"}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), namespace)


class Parsed(Exception):
    """The command's flags were understood."""


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name)
def test_the_commands_are_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(norms, "_NORMS", dict(norms._NORMS))
    save_files(page)

    def parse_and_stop(*args: Any) -> None:
        parse(*args)
        raise Parsed

    for first, *words in commands(page):
        command = cli.command(first)
        monkeypatch.setattr(command, "parse", parse_and_stop)
        with pytest.raises(Parsed):
            command.main(words)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if not link.startswith("http")]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_what_is_looked_for_is_found() -> None:
    """The tests above see blocks and commands at all, and skip only with a reason."""
    assert len(WITH_PYTHON) >= 3 and len(WITH_COMMANDS) >= 3
    sample = "<!-- not run: needs two GPUs -->\n```python\nx\n```\n\n```python\ny\n```\n"
    assert [(m["reason"], m["code"]) for m in BLOCK.finditer(sample)] == [("needs two GPUs", "x\n"), (None, "y\n")]
