"""`GPTConfig(convention="nvidia")`: the GPT of the authors' code (use_nGPT = 0), whose rotary code is no rotation.

Held in fp64 to its formula, written out here from their model.py, and to that file itself where it is at hand.
"""

import math
import os
import sys
from pathlib import Path

import pytest
import torch

from nsphere import cli
from nsphere.fold import fold
from nsphere.gpt import GPT, GPTConfig
from nsphere.ngpt_nvidia import NvidiaGPT, from_reference_state_dict
from nsphere.presets import make_model
from nsphere.train.saved import load_run

V, T, d, L, H = 19, 12, 16, 2, 2
D = d // H
SHAPE = {"vocab_size": V, "context": T, "d_model": d, "num_layers": L, "num_heads": H}
TOKENS = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))


def weights():
    """Under the authors' names, in fp64, norms away from one."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64) / shape[-1] ** 0.5

    made = {"transformer.wte.weight": normal(V, d), "lm_head.weight": 3 * normal(V, d)}
    for i in range(L):
        block = {f"{name}.weight": normal(d, d) for name in ("query", "key", "value", "att_c_proj")}
        block |= {"c_fc.weight": normal(8 * d, d), "mlp_c_proj.weight": normal(d, 4 * d)}
        block |= {f"rmsnorm_{name}.weight": 1 + normal(d) for name in ("att", "mlp")}
        made |= {f"transformer.h.{i}.{name}": w for name, w in block.items()}
    return made | {"rmsnorm_f.weight": 1 + normal(d)}


def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x, p):
    """A head's vector at position p: its pairs swapped, one negated, times the halves of [sin pθ₀, cos pθ₀, …]."""
    row = [f(p * 10000 ** (-2 * i / D)) for i in range(D // 2) for f in (math.sin, math.cos)]
    sin, cos = torch.tensor(row).double().chunk(2)  # rounded to fp32, as theirs and ours
    return torch.stack([part for i in range(D // 2) for part in (-x[2 * i + 1] * cos[i], x[2 * i] * sin[i])])


def formula(w, tokens):
    """Logits [T, V] of one sequence, a head and a position at a time."""
    h = w["transformer.wte.weight"][tokens]
    for i in range(L):
        block = {name.removeprefix(f"transformer.h.{i}."): t for name, t in w.items()}
        x = rms_norm(h, block["rmsnorm_att.weight"])
        q, k, v = ((x @ block[f"{name}.weight"].T).view(T, H, D) for name in ("query", "key", "value"))
        y = []
        for p in range(T):
            for head in range(H):
                logits = torch.stack([turned(q[p, head], p) @ turned(k[s, head], s) for s in range(p + 1)])
                y.append((logits / D**0.5).softmax(0) @ v[: p + 1, head])
        h = h + torch.stack(y).view(T, d) @ block["att_c_proj.weight"].T
        u, gate = (rms_norm(h, block["rmsnorm_mlp.weight"]) @ block["c_fc.weight"].T).chunk(2, -1)
        h = h + (u * gate * gate.sigmoid()) @ block["mlp_c_proj.weight"].T
    return rms_norm(h, w["rmsnorm_f.weight"]) @ w["lm_head.weight"].T


def ours(w):
    model = make_model(GPTConfig(**SHAPE, convention="nvidia")).double()
    assert type(model) is NvidiaGPT
    model.load_state_dict(from_reference_state_dict(w))
    return model


CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def test_fp64_logits_and_every_gradient():
    w = {name: t.requires_grad_() for name, t in weights().items()}
    expected = torch.stack([formula(w, row) for row in TOKENS])
    model = ours({name: t.detach() for name, t in w.items()})
    torch.testing.assert_close(model(TOKENS), expected, **CLOSE)
    direction = torch.randn(expected.shape, dtype=torch.float64)
    (expected * direction).sum().backward()
    (model(TOKENS) * direction).sum().backward()
    gradients = from_reference_state_dict({name: t.grad for name, t in w.items()})
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    rotating = make_model(GPTConfig(**SHAPE)).double()
    rotating.load_state_dict(dict(model.state_dict()))
    assert (rotating(TOKENS) - expected).norm() > 1e-2 * expected.norm()  # it is another function


@pytest.mark.skipif("NGPT_MODEL_PY" not in os.environ, reason="NGPT_MODEL_PY names no model.py of NVIDIA/ngpt")
@torch.no_grad()
def test_the_formula_is_what_the_authors_code_computes(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    monkeypatch.delitem(sys.modules, "make_golden", raising=False)  # another's has the same name
    import make_golden

    for name, value in (("block_size", T), ("vocab_size", V), ("n_layer", L), ("n_head", H), ("n_embd", d)):
        monkeypatch.setitem(make_golden.SHAPE, name, value)
    reference = make_golden.import_reference(Path(os.environ["NGPT_MODEL_PY"]))
    theirs = make_golden.build(reference, torch.float64, use_nGPT=0)
    theirs.load_state_dict(weights())
    logits, _ = theirs(TOKENS, TOKENS)
    torch.testing.assert_close(logits, torch.stack([formula(weights(), row) for row in TOKENS]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_folded_and_through_a_cache_it_is_the_same_function():
    model = ours(weights())
    folded = fold(model)
    cache = folded.make_cache(2, T, torch.float64)
    logits = torch.cat([folded(TOKENS[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, T))], 1)
    torch.testing.assert_close(logits, model(TOKENS), **CLOSE)


@torch.no_grad()
def test_a_checkpoint_is_imported_and_leaves_by_the_exports_that_can_hold_it(tmp_path, capsys):
    pytest.importorskip("transformers")
    said = {"n_head": H, "n_embd": d, "n_layer": L, "block_size": T, "base_scale": d**-0.5, "use_nGPT": 0}
    state = {f"_orig_mod.{name}": t.float() for name, t in weights().items()}
    torch.save({"model": state, "model_args": said, "iter_num": 7}, tmp_path / "ckpt.pt")
    assert cli.main(["import", str(tmp_path / "ckpt.pt"), str(tmp_path / "run")]) == 0
    assert "gpt, " in capsys.readouterr().out
    model = load_run(tmp_path / "run", torch.device("cpu")).model
    assert model.config == GPTConfig(**SHAPE, convention="nvidia", init_std=d**-0.5)
    expected = torch.stack([formula(weights(), row) for row in TOKENS]).float()
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)

    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "x.safetensors"), "--to", "safetensors"]) == 0
    assert cli.main(["import", str(tmp_path / "x.safetensors"), str(tmp_path / "back")]) == 0
    back = load_run(tmp_path / "back", torch.device("cpu")).model
    assert torch.equal(back(TOKENS), model(TOKENS))
    capsys.readouterr()
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 2
    _, err = capsys.readouterr()
    assert "transformers has no model with the rotary code of the authors' GPT" in err and err.count("\n") == 1
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("fields", [{"qk_norm": "rms"}, {"num_kv_heads": 1}])
def test_what_their_gpt_does_not_have_is_refused(fields):
    with pytest.raises(ValueError, match="convention nvidia is the authors' code, wh"):
        GPTConfig(**SHAPE, convention="nvidia", **fields)


def test_the_class_of_the_other_convention_refuses_the_config():
    for build, convention in ((GPT, "nvidia"), (NvidiaGPT, "paper")):
        with pytest.raises(ValueError, match=f"the config says '{convention}'; build it with nsphere.make_model"):
            build(GPTConfig(**SHAPE, convention=convention))
