"""The two lists of versions that are installed, against what pyproject.toml allows."""

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
HELD = {"pyarrow", "pyparsing"}
"""What the oldest versions need themselves, and not as new as pip would take it."""


def required() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    requirements = [Requirement(line) for line in lines]
    assert len({r.name for r in requirements}) == len(requirements)
    return {r.name: r for r in requirements}


def pins(file: str) -> dict[str, Requirement]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def only(requirement: Requirement, operator: str) -> Version:
    (specifier,) = requirement.specifier
    assert specifier.operator == operator, f"{requirement}: expected one {operator}"
    return Version(specifier.version)


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    bounds, oldest = required(), pins("constraints-oldest.txt")
    assert {name: (only(r, ">="), str(r.marker)) for name, r in bounds.items()} == {
        name: (only(r, "=="), str(r.marker)) for name, r in oldest.items() if name not in HELD
    }


def test_ci_pins_every_dependency_within_its_bounds() -> None:
    bounds, pinned = required(), pins("constraints.txt")
    assert set(bounds) == set(pinned)
    for name, pin in pinned.items():
        assert only(pin, "==") in bounds[name].specifier, pin


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
def test_triton_is_the_one_that_torch_asks_for(file: str) -> None:
    # the metadata of torch's wheels for Linux on PyPI; pip refuses any other beside them
    triton = {"2.11": "3.6", "2.13": "3.7.1"}
    pinned = pins(file)
    assert only(pinned["triton"], "==") == Version(triton[str(only(pinned["torch"], "==")).removesuffix(".0")])
