import pytest
import torch

from nsphere.fold import fold
from nsphere.hypersphere import sphere_matrices
from nsphere.ngpt_nvidia import NvidiaNGPT
from nsphere.presets import make_config, make_model

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

CASES = {
    "paper": ("ngpt", {}),
    "gqa": ("ngpt", {"num_kv_heads": 1}),
    "scalars": ("ngpt", {"eigen_lr": "scalar", "s_qk": "scalar", "s_uv": "scalar", "s_z": "scalar"}),
    "fixed": ("ngpt", {"eigen_lr": "fixed", "s_qk": "fixed", "s_uv": "fixed", "s_z": "fixed"}),
    "forward": ("ngpt", {"projection": "forward"}),
    "no qk norm": ("ngpt", {"qk_norm": False}),
    "nvidia": ("ngpt", {"convention": "nvidia"}),
    "gpt": ("gpt", {"qk_norm": "rms", "num_kv_heads": 1}),
}


def make(case, *, head_dim=8, **more):
    architecture, fields = CASES[case]
    torch.manual_seed(0)
    shape = {"vocab_size": 19, "context": 12, "d_model": 24, "num_layers": 2, "num_heads": 2, "head_dim": head_dim}
    model = make_model(make_config(architecture, **shape, **fields, **more))
    with torch.no_grad():
        for p in model.parameters():  # vectors away from their start, α of both signs, matrices off the sphere
            p.mul_(torch.empty_like(p).uniform_(-1.5, 1.5) if p.dim() == 1 else 1 + 0.1 * torch.randn_like(p))
    return model


TOKENS = torch.randint(19, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_same_function(case):
    model = make(case).double()
    expected = model(TOKENS)
    before = {name: p.clone() for name, p in model.named_parameters()}
    folded = fold(model)
    torch.testing.assert_close(folded(TOKENS), expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(folded.loss(TOKENS, TOKENS), model.loss(TOKENS, TOKENS), rtol=1e-12, atol=0)
    # the original is left alone, and changing it does not change the copy
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        p.fill_(0.1)
    torch.testing.assert_close(folded(TOKENS), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_fp32_to_rounding(case):
    model = make(case)
    exact = make(case).double()(TOKENS)
    plain = (model(TOKENS) - exact).norm()
    assert (fold(model)(TOKENS) - exact).norm() <= 2 * plain + 1e-6 * exact.norm()


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("nvidia", "fixed", "scalars")])
@torch.no_grad()
def test_bf16_bit_for_bit(case):
    """With a head_dim whose root is a power of two; else folding √D into s_qk² rounds elsewhere."""
    model = make(case, head_dim=16)
    folded = fold(model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(folded(TOKENS), model(TOKENS))
    assert folded.blocks[0].mlp.W_u.weight.dtype == torch.bfloat16
    assert folded.embed.weight.dtype == torch.float32


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_bf16_to_rounding(case):
    model = make(case)
    exact = make(case).double()(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        plain, folded = model(TOKENS), fold(model, torch.bfloat16)(TOKENS)
    assert (folded - exact).norm() <= 1.5 * (plain - exact).norm()


@pytest.mark.parametrize("case", [case for case in CASES if case != "gpt"])
@torch.no_grad()
def test_nothing_is_left_to_do_per_token(case):
    folded = fold(make(case))
    assert not any(p.requires_grad for p in folded.parameters())
    assert not list(sphere_matrices(folded))
    left = {type(m).__name__ for m in folded.modules()} & {"Scale", "QKScale"}
    assert not left
    attention = folded.blocks[0].attn
    assert attention.qk_norm.softmax_scale == 1.0
    _, k, _ = attention.qkv(torch.randn(2, 12, 24), (folded.rope_cos, folded.rope_sin))
    if case != "no qk norm":
        assert folded.unit_keys
        torch.testing.assert_close(k.norm(dim=-1), torch.ones(k.shape[:-1]))
    assert isinstance(folded, NvidiaNGPT) == (case == "nvidia")


@torch.no_grad()
def test_folding_twice_changes_nothing():
    once = fold(make("nvidia"))
    assert torch.equal(fold(once)(TOKENS), once(TOKENS))


@torch.no_grad()
def test_a_model_prepared_for_compiling():
    model = make("paper")
    expected = fold(model).loss(TOKENS, TOKENS)
    model.compile_parts()
    folded = fold(model)
    for p in model.parameters():
        p.zero_()
    torch.testing.assert_close(folded.loss(TOKENS, TOKENS), expected)


def test_what_cannot_be_folded():
    with pytest.raises(ValueError, match="fold is for GPT and NGPT of this library, got a Linear"):
        fold(torch.nn.Linear(2, 2))
    model = make_model(make_config("gpt", vocab_size=8, context=4, d_model=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="matrices of torch.int8 are not supported"):
        fold(model, torch.int8)
