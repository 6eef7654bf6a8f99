"""GPT against its formulas in fp64."""

import copy
import math

import plain_models
import pytest
import torch

from nsphere import norms
from nsphere.gpt import GPT, GPTConfig
from nsphere.hypersphere import sphere_matrices

SHAPE = {"vocab_size": 17, "context": 8, "d_model": 12, "num_layers": 2, "num_heads": 3}


def make(dtype=torch.float64, seed=0, **fields):
    torch.manual_seed(seed)
    # an init of 0.3 lets every part of a small model matter
    return plain_models.perturb(GPT(GPTConfig(**SHAPE | {"init_std": 0.3} | fields))).to(dtype)


def batch(num_tokens=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(17, (2, 2, num_tokens), generator=generator).unbind()


VARIANTS = {
    "plain": {},
    "tied": {"tied": True},
    "rms QK norm": {"qk_norm": "rms"},
    "l2 QK norm, gqa": {"qk_norm": "l2", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
    "mqa, odd MLP, narrow heads": {"num_kv_heads": 1, "head_dim": 2, "d_mlp": 7},
    "own eps and base": {"norm_eps": 0.1, "rope_base": 50.0},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_loss_and_every_gradient(fields):
    plain_models.compare(make(**fields), plain_models.gpt_logits, *batch())


@pytest.mark.parametrize("fields", [{}, {"qk_norm": "rms", "num_kv_heads": 1}])
def test_document_mask(fields):
    model = make(**fields)
    tokens, targets = batch()
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [5, 5, 5, 5, 5, 5, 5, 5]])
    plain_models.compare(model, plain_models.gpt_logits, tokens, targets, ids)
    alone = torch.cat([model(tokens[:1, s]) for s in (slice(0, 3), slice(3, 7), slice(7, 8))], dim=1)
    together = model(tokens, ids)
    torch.testing.assert_close(together[:1], alone, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(together[1:], model(tokens[1:]), rtol=1e-11, atol=1e-12)
    assert (model(tokens[:1]) - alone).abs().max() > 1e-3


@pytest.mark.parametrize("fields", [{}, {"qk_norm": "rms", "num_kv_heads": 1}])
def test_cache_gives_the_logits_of_the_full_forward(fields):
    model = make(**fields)
    tokens, _ = batch(num_tokens=11)
    cache = model.make_cache(2, 11, torch.float64)
    parts = [model(tokens[:, a:b], cache=cache) for a, b in ((0, 1), (1, 6), (6, 11))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-11, atol=1e-12)


def test_tied_weights_are_one_parameter():
    tied, untied = make(tied=True), make()
    assert untied.num_parameters() - tied.num_parameters() == 17 * 12
    assert tied.output_weight() is tied.embed.weight
    tokens, targets = batch()
    tied.loss(tokens, targets).backward()
    through_both = tied.embed.weight.grad.clone()
    tied.zero_grad()
    rows = tied.embed.weight.detach()[tokens]
    tied.embed.forward = lambda tokens: rows
    tied.loss(tokens, targets).backward()
    # what is left without the look-up reaches rows that no token asked for, and is not the whole
    assert (through_both - tied.embed.weight.grad).abs().max() > 1e-3


def test_init():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=512, context=8, d_model=128, num_layers=8, num_heads=4)
    for name, p in GPT(config).named_parameters():
        if p.dim() == 1:
            assert (p == 1).all()
        else:
            expected = 0.02 / math.sqrt(16) if name.endswith(("W_o.weight", "W_down.weight")) else 0.02
            assert abs(p.std().item() / expected - 1) < 0.02, name
            assert abs(p.mean().item()) < 4 * expected / math.sqrt(p.numel()), name


def test_no_matrix_of_a_gpt_belongs_on_the_sphere():
    assert list(sphere_matrices(make())) == []


@pytest.mark.parametrize("qk_norm", ["none", "rms"])
def test_autocast_keeps_the_residual_in_fp32(qk_norm):
    model, exact = make(torch.float32, qk_norm=qk_norm), make(qk_norm=qk_norm)
    dtypes = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, x, h: dtypes.append(h.dtype))
    tokens, targets = batch()
    with torch.autocast("cpu", torch.bfloat16):
        qkv = model.blocks[0].attn.qkv(torch.randn(2, 8, 12), (model.rope_cos, model.rope_sin))
        loss = model.loss(tokens, targets)
    assert dtypes == [torch.float32] * 2
    assert {t.dtype for t in qkv} == {torch.bfloat16}
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact.loss(tokens, targets), rtol=5e-3, atol=0)


@pytest.mark.parametrize("fields", [{}, {"tied": True, "qk_norm": "rms"}])
class TestLifeOfAModel:
    def test_state_dict_round_trip_and_deepcopy(self, fields):
        model, other = make(torch.float32, **fields), make(torch.float32, seed=3, **fields)
        tokens, _ = batch()
        logits = model(tokens)
        assert not torch.equal(logits, other(tokens))
        other.load_state_dict(model.state_dict())
        assert torch.equal(logits, other(tokens))
        twin = copy.deepcopy(model)
        with torch.no_grad():
            model.embed.weight.zero_()
        assert torch.equal(logits, twin(tokens))

    def test_meta_device_then_reset_is_a_fresh_model(self, fields):
        with torch.device("meta"):
            model = GPT(GPTConfig(**SHAPE | fields))
        model.to_empty(device="cpu")
        with torch.no_grad():
            for t in (*model.parameters(), *model.buffers()):
                t.fill_(torch.nan)
        torch.manual_seed(0)
        model.reset_parameters()
        fresh = GPT(GPTConfig(**SHAPE | fields))
        for name, p in model.named_parameters():
            assert (p == 1).all() if p.dim() == 1 else 0.8 < p.std() / fresh.get_parameter(name).std() < 1.25, name
        fresh.load_state_dict(model.state_dict())
        tokens, _ = batch()
        assert torch.equal(model(tokens), fresh(tokens))


def test_a_registered_norm_that_needs_the_number_of_heads(monkeypatch):
    monkeypatch.setattr(norms, "_NORMS", dict(norms._NORMS))

    @norms.register_norm("by_head")
    class ByHead(norms.RMSNorm):
        def __init__(self, dim, num_heads):
            super().__init__(dim, weight="per_head", num_heads=num_heads)

    model = make(qk_norm="by_head")
    shape = (SHAPE["num_heads"], SHAPE["d_model"] // SHAPE["num_heads"])
    assert model.blocks[0].attn.qk_norm.q_norm.weight.shape == shape
    assert model(batch()[0]).isfinite().all()
