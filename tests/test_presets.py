"""Presets: parameters to the unit."""

import pytest
import torch

from nsphere.gpt import GPT, GPTConfig
from nsphere.ngpt import NGPT, NGPTConfig
from nsphere.ngpt_nvidia import NvidiaNGPT
from nsphere.presets import PRESETS, make_config, make_model


def count(architecture, name, **fields):
    with torch.device("meta"):
        return make_model(
            make_config(architecture, vocab_size=PRESETS[name].vocab_size, **PRESETS[name].shape(), **fields)
        ).num_parameters()


@pytest.mark.parametrize(("name", "expected"), [("0.5b", 468_491_520), ("1b", 1_026_177_280)])
def test_the_papers_sizes_to_the_unit(name, expected):
    preset = PRESETS[name]
    d, L, V = preset.d_model, preset.num_layers, preset.vocab_size
    assert count("ngpt", name) == 16 * d * d * L + 2 * V * d + 11 * d * L + V == expected
    assert count("ngpt", name, convention="nvidia") == expected
    # what GPT has instead of the scales: two norms a layer, and the last
    assert count("gpt", name) == 16 * d * d * L + 2 * V * d + 2 * d * L + d


def test_the_papers_table_of_sizes():
    sizes = {name: (p.num_layers, p.d_model, p.num_heads) for name, p in PRESETS.items()}
    assert sizes["0.5b"] == (24, 1024, 16)
    assert sizes["1b"] == (36, 1280, 20)
    assert sizes["gpt2-small"] == (12, 768, 12)
    assert (*sizes["demo"], PRESETS["demo"].context) == (4, 256, 4, 256)


@pytest.mark.parametrize("name", PRESETS)
def test_qk_norm_adds_two_vectors_a_layer(name):
    preset = PRESETS[name]
    with_norm = count("gpt", name, qk_norm="rms")
    assert with_norm - count("gpt", name) == 2 * preset.num_layers * preset.d_model // preset.num_heads


def test_a_config_knows_its_model():
    shape = {"vocab_size": 7, "context": 4, "d_model": 8, "num_layers": 1, "num_heads": 2}
    assert type(make_model(GPTConfig(**shape))) is GPT
    assert type(make_model(NGPTConfig(**shape))) is NGPT
    assert type(make_model(NGPTConfig(**shape, convention="nvidia"))) is NvidiaNGPT
    with pytest.raises(ValueError, match="no architecture has a config of type dict"):
        make_model(shape)


def test_a_seed_gives_a_model():
    config = make_config("ngpt", vocab_size=7, context=4, d_model=8, num_layers=1, num_heads=2)
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(make_model(config).embed.weight)
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])


def test_an_unknown_architecture():
    with pytest.raises(ValueError, match="unknown architecture 'bert'; choose gpt, ngpt"):
        make_config("bert")


def test_weights_of_another_convention_are_refused(tmp_path):
    """Those of paper and nvidia have the same names and shapes: torch alone would load one into the other."""
    shape = {"vocab_size": 11, "context": 8, "d_model": 8, "num_layers": 1, "num_heads": 2}
    for architecture, theirs, ours in (
        ("ngpt", "nvidia", "paper"),
        ("ngpt", "paper", "nvidia"),
        ("gpt", "nvidia", "paper"),
        ("gpt", "nanogpt", "paper"),
    ):
        source = make_model(make_config(architecture, **shape, convention=theirs))
        model = make_model(make_config(architecture, **shape, convention=ours))
        torch.save(source.state_dict(), tmp_path / "weights.pt")
        for state in (source.state_dict(), torch.load(tmp_path / "weights.pt")):
            with pytest.raises(ValueError, match=f"are of convention '{theirs}' and the model is of '{ours}'"):
                model.load_state_dict(state)
        twin = make_model(source.config)
        twin.load_state_dict(torch.load(tmp_path / "weights.pt"))
        assert all(torch.equal(t, twin.state_dict()[name]) for name, t in source.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*final_norm.weight"):
        model.load_state_dict(dict(make_model(make_config("ngpt", **shape)).state_dict()))
