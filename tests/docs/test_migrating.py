"""The tables for those who come from other nGPTs: they name what there is, here and, where it is installed, there."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch

from nsphere import GPTConfig, NGPTConfig
from nsphere.nanogpt import from_nanogpt_state_dict
from nsphere.ngpt_nvidia import from_reference_state_dict

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text()
FIELDS = {field.name for config in (NGPTConfig, GPTConfig) for field in dataclasses.fields(config)}


def rows(of: str) -> list[tuple[list[str], list[str]]]:
    """What stands in backticks in the first two columns, there and here, of a section's tables."""
    section = PAGE.split(f"## From {of}")[1].split("\n## ")[0]
    cells = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| ")]
    return [(re.findall("`(.+?)`", there), re.findall("`(.+?)`", here)) for there, here in cells if "`" in there + here]


def test_parameters_of_the_authors_code_become_what_the_table_says() -> None:
    pairs = [(there[0], here) for there, here in rows("the authors' code") if there]
    table = {there: here for there, here in pairs if there == "sz" or there.endswith(".weight") or ".h.0." in there}
    assert len(table) == 16
    for there, here in table.items():
        assert list(from_reference_state_dict({there: torch.ones(2, 2)})) == here


def test_parameters_of_nanogpt_become_what_the_table_says() -> None:
    table = {there[0]: here for there, here in rows("nanoGPT") if there and there[0].endswith(".weight")}
    assert len(table) == 10
    for there, here in table.items():
        assert list(from_nanogpt_state_dict({there: torch.ones(3, 2)})) == here


@pytest.mark.parametrize("of", ["the authors' code", "nGPT-pytorch", "nanoGPT"])
def test_our_arguments_exist(of: str) -> None:
    ours = [name.partition("=")[0] for _, here in rows(of) for name in here]
    names = [name for name in ours if re.fullmatch("[a-z_]+", name)]
    assert len(names) >= 8 and set(names) <= FIELDS, set(names) - FIELDS


def test_the_arguments_of_ngpt_pytorch_exist() -> None:
    theirs = pytest.importorskip("nGPT_pytorch")
    known = {**inspect.signature(theirs.nGPT).parameters, **inspect.signature(theirs.nGPT.forward).parameters}
    for there, _ in rows("nGPT-pytorch"):
        for name in there:
            if re.fullmatch(r"[a-z_]+(=\S+)?", name):
                argument = name.partition("=")[0]
                assert argument in known, argument
