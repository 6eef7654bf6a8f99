"""The README's Python runs, and its commands are the ones there are."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from nsphere import assert_on_hypersphere
from nsphere.cli import COMMANDS

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_qk_norm_example_normalises() -> None:
    (code,) = (b for b in BLOCKS if "QKNorm(" in b)
    names: dict = {"q": torch.randn(2, 5, 4, 64), "k": torch.randn(2, 5, 2, 64)}
    before = names["q"].clone()
    exec(code, names)
    # RMS norm with unit weights, then a rotation: every head has norm √D
    torch.testing.assert_close(names["q"].norm(dim=-1), torch.full((2, 5, 4), 8.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(names["q"][:, 0], before[:, 0] / before[:, 0].norm(dim=-1, keepdim=True) * 8)
    assert names["qk_norm"].softmax_scale == 64**-0.5


def test_the_hypersphere_example_keeps_a_model_there() -> None:
    (code,) = (b for b in BLOCKS if "on_sphere(" in b)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear_in, self.linear_out = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return x + self.linear_out(self.linear_in(x).relu())

    model = nn.Module()
    model.layers = nn.Sequential(Layer(), Layer())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    exec(code, {"model": model, "optimizer": optimizer})
    for _ in range(3):
        model.layers(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        assert_on_hypersphere(model)


def test_every_command_shown_exists() -> None:
    shown = re.findall(r"^\$ nsphere (\S+)", README, re.M)
    assert set(shown) <= set(COMMANDS) and len(shown) >= 5


@pytest.mark.parametrize("target", re.findall(r"\$ make (\S+)", README))
def test_every_make_target_shown_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (Path(__file__).parents[2] / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_every_link_leads_somewhere(link: str) -> None:
    assert (Path(__file__).parents[2] / link).exists(), link
