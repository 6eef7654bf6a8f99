"""Everything public is in the reference, and says what it does."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import nsphere
import nsphere.ops
import nsphere.te

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
PEERS = {"nsphere.hf": "transformers"}
"""What a public package needs beyond torch."""

RUNS = {  # the modules behind the commands
    "nsphere.train.loop": ["train"],
    "nsphere.train.config": ["TrainConfig", "RunOptions"],
    "nsphere.train.data": ["DataConfig", "load_corpus"],
    "nsphere.train.saved": ["load_run", "SavedRun"],
    "nsphere.compare": ["compare", "CompareConfig"],
    "nsphere.generate": ["Generation", "Sampling", "generate", "generate_texts"],
    "nsphere.fold": ["fold"],
    "nsphere.kv_cache": ["KVCache"],
    "nsphere.export": ["export"],
    "nsphere.import_model": ["import_model"],
}


def public() -> dict[str, list[str]]:
    """The public names of each module, but for the plumbing of the operations."""
    found = {package: list(importlib.import_module(package).__all__) for package in ("nsphere", "nsphere.te")}
    for module in pkgutil.iter_modules(nsphere.ops.__path__):
        if module.ispkg:  # one operation each
            name = f"nsphere.ops.{module.name}"
            found[name] = exported(importlib.import_module(name))
    return found | {"nsphere.hf": []} | RUNS


def exported(module: ModuleType) -> list[str]:
    own = [n for n, x in vars(module).items() if inspect.isfunction(x) and x.__module__ == module.__name__]
    return getattr(module, "__all__", [n for n in own if not n.startswith("_")])


def documented() -> dict[str, str]:
    """module.name of everything in the reference, and the page that has it, as Sphinx resolves the directives."""
    found: dict[str, str] = {}
    for page in sorted(REFERENCE.glob("*.md")):
        for block in re.findall(r"```{eval-rst}\n(.*?)```", page.read_text(), re.S):
            current = ""
            lines = re.findall(r"^\.\. (\w+):: (\S+)$(?:\n   :members: (.+))?", block, re.M)
            for kind, target, members in lines:
                if kind == "currentmodule":
                    current = target
                elif kind == "automodule":
                    found[target] = page.name
                    names = members.split(", ") if members else exported(importlib.import_module(target))
                    found.update({f"{target}.{name}": page.name for name in names})
                else:
                    found[target if target.startswith("nsphere.") else f"{current}.{target}"] = page.name
    return found


@pytest.mark.parametrize("module", sorted(public()))
def test_every_public_name_is_in_the_reference_and_documented(module: str) -> None:
    if module in PEERS:
        pytest.importorskip(PEERS[module])
    names = public()[module] or importlib.import_module(module).__all__
    known = documented()
    missing = [name for name in names if f"{module}.{name}" not in known]
    assert not missing, f"docs/reference/*.md lacks {missing} of {module}"
    things: dict[str, Any] = {name: getattr(importlib.import_module(module), name) for name in names}
    silent = [name for name, thing in things.items() if not own_docstring(thing)]
    assert not silent, f"{silent} of {module} have no docstring"


def own_docstring(thing: Any) -> str | None:
    """What is written at the thing itself, and is not a base class's or the one that dataclasses make."""
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    return None if text is None or text.startswith(f"{getattr(thing, '__name__', '')}(") else text


def test_what_is_looked_for_is_found() -> None:
    known = documented()
    assert known["nsphere.QKNorm"] == "qk-norm.md" and known["nsphere.te.Linear"] == "transformer-engine.md"
    assert known["nsphere.ops.backend.choose"] == "ops.md" and "nsphere.ops.backend.refuse" not in known
    assert "normalized_update" in public()["nsphere.ops.normalized_update"]
