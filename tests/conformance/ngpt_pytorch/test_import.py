"""Models of PyPI's nGPT-pytorch as ours, held to what its own code computed: golden.safetensors, by make_golden.py."""

from pathlib import Path

import pytest
import torch

from nsphere import cli
from nsphere.hypersphere import assert_on_hypersphere
from nsphere.ngpt_pytorch import from_ngpt_pytorch
from nsphere.presets import make_model
from nsphere.train.saved import load_run

safetensors = pytest.importorskip("safetensors.torch")

CASES = {
    "default": [],
    "manual": [],
    "tied": [],
    "plain_qk": ["attn_norm_qk=False"],
    "scales": [
        "alpha_attn_init=(0.3, 0.2)",
        "alpha_ff_scale=0.5",
        "s_qk_init=1.5",
        "s_qk_scale=0.5",
        "s_logit_init=4.0",
        "s_ff_gate_init=1.2",
        "s_ff_hidden_scale=2.0",
    ],
}


@pytest.fixture(scope="module")
def golden():
    return safetensors.load_file(Path(__file__).with_name("golden.safetensors"))


def weights_of(golden, case):
    prefix = f"{case}.weights."
    return {name.removeprefix(prefix): t for name, t in golden.items() if name.startswith(prefix)}


def call(capsys, *argv):
    code = cli.main([str(a) for a in argv])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_its_logits_are_ours(golden, case, tmp_path, capsys):
    state = weights_of(golden, case)
    torch.save({"model": state} if case == "tied" else state, tmp_path / "ngpt.pt")
    said = [part for option in ["add_value_residual=False", *CASES[case]] for part in ("--option", option)]
    code, out, err = call(capsys, "import", tmp_path / "ngpt.pt", tmp_path / "run", "--context", 12, *said)
    assert code == 0 and "ngpt" in out, err
    model = load_run(tmp_path / "run", torch.device("cpu")).model
    expected = golden[f"{case}.logits"]
    assert (model(golden["tokens"]) - expected).norm() < 2e-6 * expected.norm()
    assert_on_hypersphere(model)
    if CASES[case]:  # and the options matter
        config, plain = from_ngpt_pytorch(state, 12, {"add_value_residual": False})
        model = make_model(config)
        model.load_state_dict(plain)
        assert (model(golden["tokens"]) - expected).norm() > 1e-3 * expected.norm()


def test_what_has_no_equal_is_refused(golden, tmp_path, capsys):
    state = weights_of(golden, "default")
    manual = weights_of(golden, "manual")
    alpha, scale = "layers.1.1.branch_scale.scale", "layers.0.0.fn.qk_scale.scale"
    half = {name: t for name, t in state.items() if "layers.1.0.fn.to_v" not in name}
    for options, weights, message in (
        ([], state, "add_value_residual=True (its default) averages values with those of the first layer"),
        (["norm_eps=0.1"], state, "norm_eps=0.1 lets vectors off the sphere"),
        (["num_hyperspheres=2"], state, "num_hyperspheres=2 splits vectors"),
        (["causal=False"], state, "causal=False sees what comes after a token"),
        (["depth=3"], state, "no option 'depth' that matters here"),
        (["norm_eps=small"], state, "is not NAME=VALUE"),
        ([], state | {alpha: -state[alpha]}, "α of layer 1 has negative numbers"),
        ([], state | {scale: -state[scale]}, "scale of q in layer 0 has negative numbers"),
        ([], state | {"rotary_embed.freqs": state["rotary_embed.freqs"] * 2}, "rotates with other frequencies"),
        ([], manual | {"to_logits.linear.weight": 1.1 * manual["to_logits.linear.weight"]}, "to_logits is off the"),
        ([], half, "lacks layers.1.0.fn.to_v"),
        ([], {name: state[name] for name in state if name.startswith("token_embed")}, "it lacks rotary_embed.freqs"),
        ([], {"token_embed.linear.weight": torch.ones(2)}, "token_embed of this nGPT-pytorch model is no matrix"),
    ):
        torch.save(weights, tmp_path / "ngpt.pt")
        residual = [] if message.startswith("add_value") else ["--option", "add_value_residual=False"]
        said = [*residual, *(part for option in options for part in ("--option", option))]
        code, out, err = call(capsys, "import", tmp_path / "ngpt.pt", tmp_path / "run", "--context", 12, *said)
        assert (code, out, err.count("\n")) == (2, "", 1) and message in err, err
        assert not (tmp_path / "run").exists()
    torch.save(state, tmp_path / "ngpt.pt")
    code, _, err = call(capsys, "import", tmp_path / "ngpt.pt", tmp_path / "run")
    assert code == 2 and "does not say its context; give --context" in err
