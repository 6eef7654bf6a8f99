"""Imports go down: CONTRIBUTING.md names the rooms of the house from the roof down; each imports lower ones only."""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "src" / "nsphere").rglob("*.py")
}


def rooms() -> list[str]:
    """The rooms of the map in its order, a room being a module or a folder of the package."""
    block = re.search(r"```text\nsrc/nsphere/\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    assert block, "CONTRIBUTING.md has no map of src/nsphere/"
    names = re.findall(r"^  (\w+)(?:/|\.py) ", block[1], re.M)
    return ["nsphere" if name == "__init__" else f"nsphere.{name}" for name in names]


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imported(source: str) -> Iterator[str]:
    """The package's own modules that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in SOURCES)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and node.level == 0, "imports name the package"
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                if name in SOURCES or node.module in SOURCES:
                    yield name if name in SOURCES else node.module


IMPORTS = {module: set(imported(path.read_text())) for module, path in SOURCES.items()}


def test_every_room_is_on_the_map_once() -> None:
    assert sorted(rooms()) == sorted({room_of(module) for module in SOURCES})


def test_a_room_imports_lower_rooms_only() -> None:
    floor = {room: i for i, room in enumerate(rooms())}
    upwards = [
        f"{module} imports {other}, which stands above it in CONTRIBUTING.md"
        for module, others in sorted(IMPORTS.items())
        for other in sorted(others)
        if room_of(module) != room_of(other) and floor[room_of(module)] > floor[room_of(other)]
    ]
    assert not upwards


def test_no_module_imports_itself_by_way_of_others() -> None:
    graphlib.TopologicalSorter(IMPORTS).prepare()  # raises CycleError, with the modules of the circle


def test_imports_are_seen() -> None:
    source = "import nsphere.ops\nfrom nsphere import norms, QKNorm\ndef f():\n    from nsphere.rope import rotate\n"
    assert list(imported(source)) == ["nsphere.ops", "nsphere.norms", "nsphere", "nsphere.rope"]
    assert "nsphere.hf.serve" in IMPORTS["nsphere.commands.serve"]
