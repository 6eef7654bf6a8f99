"""The README's Python runs, its commands are the ones there are, and its numbers those that were measured."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from nsphere import assert_on_hypersphere
from nsphere.cli import COMMANDS
from nsphere.presets import PRESETS, make_model
from nsphere.train.config import TrainConfig, model_config, resolve

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
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
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_every_link_leads_somewhere(link: str) -> None:
    assert (ROOT / link).exists(), link


def result(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["results"]


def spread(ratios: list[float]) -> str:
    return f"{min(ratios):.2f}× to {max(ratios):.2f}×"


def test_the_ratios_are_those_of_the_results() -> None:
    """A new result in benchmarks/results asks for new numbers in the README."""
    step, fuse, decode = result("step"), result("fuse"), result("decode")["ngpt"]
    prompt, token = (decode[f"{what}_over_gpt_qknorm"][1] for what in ("prefill", "token"))

    def fused(what: str) -> str:
        return spread([r["fused_over_plain"][1] for name, r in fuse.items() if name.startswith(what)])

    sizes = [f"{step[f'{size} compiled']['ngpt']['over_gpt-qknorm'][1]:.2f}×" for size in ("demo", "d512")]
    expected = {
        "nsphere bench step": f"{sizes[0]} (d 256), {sizes[1]} (d 512)",
        "nsphere bench decode": f"prompt {prompt:.2f}×, each token {token:.2f}×",
        "benchmarks/qk.py": spread([kind["ratio_quartiles"]["torch.compile"][1] for kind in result("qk")["kinds"]]),
        "benchmarks/fuse.py": f"training {fused('step')}, generation {fused('generation')}",
    }
    for command, numbers in expected.items():
        (row,) = (line for line in README.splitlines() if line.startswith("|") and command in line)
        assert numbers in row, f"the row of {command} should say {numbers}: {row}"


def test_the_demos_table_is_of_the_demo_there_is() -> None:
    demo = PRESETS["demo"]
    rows = re.findall(r"^(gpt|gpt-qknorm|ngpt) +([\d.]+) +([\d.]+) +([\d.]+) +([\d,]+) .* ([\d,]+)$", README, re.M)
    assert [arm for arm, *_ in rows] == ["gpt", "gpt-qknorm", "ngpt"]
    finals = {}
    for arm, loss, bits, lr, tokens, parameters in rows:
        model = make_model(model_config(arm, resolve(arm, TrainConfig()), vocab_size=256))
        assert int(parameters.replace(",", "")) == model.num_parameters()
        assert float(lr) == demo.tuned_lr[arm]
        assert int(tokens.replace(",", "")) == demo.steps * demo.batch_size * demo.context
        assert float(bits) == pytest.approx(float(loss) / math.log(2), abs=2e-4)  # a token is a byte
        finals[arm] = float(loss)
    said = re.search(r"its final loss is ([\d.]+) nats per token. nGPT itself ended at ([\d.]+)", README)
    assert said and [float(x) for x in said.groups()] == [round(finals["gpt-qknorm"], 3), round(finals["ngpt"], 3)]
    ratios = re.search(r"nGPT needed ([\d.]+×) the tokens and ([\d.]+×) the seconds", README)
    assert ratios and f"{ratios[1]} the tokens, {ratios[2]} the seconds | `make demo`" in README
