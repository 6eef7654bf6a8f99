"""Attention, SwiGLU, the cache and the decoder's frame."""

import itertools

import plain_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nsphere.gpt import GPT, GPTConfig
from nsphere.kv_cache import KVCache
from nsphere.layers import Attention, DecoderConfig, SwiGLU
from nsphere.qk_norm import QKNorm
from nsphere.rope import RopeSpec

SHAPE = {"vocab_size": 17, "context": 8, "d_model": 12, "num_layers": 1, "num_heads": 3}


def make_attention(H, K, D, d=12):
    torch.manual_seed(0)
    spec = RopeSpec(dim=D)
    widths = ((d, H * D), (d, K * D), (d, K * D), (H * D, d))
    qk_norm = QKNorm(None, head_dim=D, num_heads=H, num_kv_heads=K, rope=spec)
    attention = Attention(*(nn.Linear(*w, bias=False) for w in widths), qk_norm, D).double()
    return attention, tuple(t.double() for t in spec.tables(16))


@settings(max_examples=20, deadline=None)
@given(
    K=st.integers(1, 3),
    group=st.integers(1, 3),
    D=st.sampled_from([2, 4, 6]),
    T=st.integers(1, 9),
    cuts=st.lists(st.integers(1, 8), max_size=3),
)
def test_attention_by_heads_with_and_without_cache(K, group, D, T, cuts):
    H = K * group
    attention, (cos, sin) = make_attention(H, K, D)
    x = torch.randn(2, T, 12, dtype=torch.float64)
    q, k, v = (W(x).view(2, T, -1, D) for W in (attention.W_q, attention.W_k, attention.W_v))
    q, k = plain_models.rotate(q, 10000.0), plain_models.rotate(k, 10000.0)
    expected = attention.W_o(plain_models.attend(q, k, v, D**-0.5))
    torch.testing.assert_close(attention(x, (cos[:T], sin[:T])), expected)

    cache = KVCache(1, 2, T, K, D, torch.float64, "cpu")
    edges = sorted({0, T, *(c for c in cuts if c < T)})
    pieces = []
    for a, b in itertools.pairwise(edges):
        mask = torch.ones(b - a, b, dtype=torch.bool).tril(a)[None, None] if a else None
        cache.reserve(b)
        positions = torch.arange(a, b).expand(2, -1)
        pieces.append(attention(x[:, a:b], (cos[a:b], sin[a:b]), mask, cache.layer(0, positions)))
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected)


def test_attention_is_causal():
    attention, (cos, sin) = make_attention(3, 1, 4)
    x = torch.randn(1, 8, 12, dtype=torch.float64, requires_grad=True)
    rope = cos[:8], sin[:8]
    for t in range(8):
        (grad,) = torch.autograd.grad(attention(x, rope)[0, t].sum(), x)
        assert (grad[0, : t + 1].abs().amax(-1) > 0).all()
        assert grad[0, t + 1 :].abs().sum() == 0


def test_attention_sees_position_differences_only():
    attention, (cos, sin) = make_attention(3, 3, 4)
    x = torch.randn(1, 8, 12, dtype=torch.float64)
    shifted = attention(x, (cos[5:13], sin[5:13]))
    torch.testing.assert_close(attention(x, (cos[:8], sin[:8])), shifted, rtol=1e-5, atol=1e-7)
    stretched = attention(x, (cos[:16:2], sin[:16:2]))
    assert (stretched - shifted).abs().max() > 1e-3


def test_swiglu():
    torch.manual_seed(0)
    mlp = SwiGLU(*(nn.Linear(*w, bias=False) for w in ((6, 9), (6, 9), (9, 6)))).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    u, nu = x @ mlp.W_u.weight.t(), x @ mlp.W_nu.weight.t()
    torch.testing.assert_close(mlp(x), (u * nu / (1 + (-nu).exp())) @ mlp.W_down.weight.t())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 13}, "d_model 13 is not divisible by num_heads 3; choose a divisor, or give head_dim"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"d_model": 9}, "head_dim 3 is odd"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"num_kv_heads": 2}, "num_heads 3 is not divisible by num_kv_heads 2"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        ({"d_mlp": 0}, "d_mlp must be at least 1, got 0"),
        ({"rope_base": 0.0}, "rope_base must be a positive number, got 0"),
        ({"rope_base": float("nan")}, "rope_base must be a positive number, got nan"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"context": 0}, "context must be at least 1"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"num_heads": -1}, "num_heads must be at least 1, got -1"),
    ],
)
def test_bad_shapes_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**SHAPE | fields)


def test_derived_shape():
    config = DecoderConfig(**SHAPE)
    assert (config.head_dim, config.num_kv_heads, config.d_mlp) == (4, 3, 48)
    given = DecoderConfig(**SHAPE | {"d_model": 13, "head_dim": 6, "num_kv_heads": 1, "d_mlp": 5})
    assert (given.head_dim, given.num_kv_heads, given.d_mlp) == (6, 1, 5)


class TestDecoder:
    def make(self):
        torch.manual_seed(0)
        return GPT(GPTConfig(**SHAPE, init_std=0.3)).double()

    def test_targets_of_minus_100_do_not_count(self):
        model = self.make()
        tokens, targets = torch.randint(17, (2, 2, 8))
        targets[0, :5] = -100
        expected = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        torch.testing.assert_close(model.loss(tokens, targets), expected)

    def test_documents_and_a_cache_exclude_each_other(self):
        model = self.make()
        tokens = torch.zeros(1, 4, dtype=torch.long)
        with pytest.raises(ValueError, match="exclude each other"):
            model(tokens, torch.zeros_like(tokens), model.make_cache(1, 4, torch.float64))

    def test_loss_under_no_grad_is_the_loss(self):
        model = self.make()
        tokens, targets = torch.randint(17, (2, 2, 8))
        with torch.no_grad():
            quiet = model.loss(tokens, targets)
        torch.testing.assert_close(quiet, model.loss(tokens, targets).detach(), rtol=1e-15, atol=0)

    def test_tables_are_no_state(self):
        assert not any("rope" in name for name in self.make().state_dict())

    def test_num_parameters(self):
        # 2 embeddings, 4 d² of attention, 12 d² of MLP, 3 norms
        assert self.make().num_parameters() == 2 * 17 * 12 + 16 * 144 + 3 * 12
