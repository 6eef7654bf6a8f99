"""A script for Transformer Engine: what its attention makes of q and k under each qk_norm_type, and what it saves.

It knows Transformer Engine alone, and runs where that is installed: `python script_for_transformer_engine.py`.
test_te_script.py runs it on nsphere.te, against_transformer_engine.py on Transformer Engine's own Python.
"""

import io
import itertools

import torch
import transformer_engine.pytorch as te
from transformer_engine.pytorch.attention import RotaryPositionEmbedding

HIDDEN, HEADS, GROUPS, HEAD_DIM = 64, 4, 2, 16
LENGTHS, KEY_LENGTHS = (5, 3), (4, 6)
QK_NORM_TYPES = (None, "L2Normalization", "RMSNorm", "LayerNorm")
# packed sequences take kernels of its own, and those bf16
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-4}[DTYPE]


def attention(kind, before, layout, cross, seed=0):
    torch.manual_seed(seed)
    mask = ("padding" if cross else "padding_causal") if layout == "thd" else ("no_mask" if cross else "causal")
    module = te.MultiheadAttention(
        HIDDEN,
        HEADS,
        num_gqa_groups=GROUPS,
        attention_dropout=0.0,
        attn_mask_type=mask,
        attention_type="cross" if cross else "self",
        qkv_format=layout,
        qk_norm_type=kind,
        qk_norm_before_rope=before,
        params_dtype=DTYPE,
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return module


def sequences(layout, lengths, device, seed):
    generator = torch.Generator().manual_seed(seed)
    if layout == "thd":
        return torch.randn(sum(lengths), HIDDEN, generator=generator).to(device, DTYPE)
    shape = (lengths[0], len(lengths)) if layout == "sbhd" else (len(lengths), lengths[0])
    return torch.randn(*shape, HIDDEN, generator=generator).to(device, DTYPE)


def inputs(layout, cross, device):
    x, call = sequences(layout, LENGTHS, device, 1), {}
    if cross:
        call["encoder_output"] = sequences(layout, KEY_LENGTHS, device, 2)
    if layout == "thd":
        ends, key_ends = (
            torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
            for lengths in (LENGTHS, KEY_LENGTHS if cross else LENGTHS)
        )
        call |= {"cu_seqlens_q": ends, "cu_seqlens_kv": key_ends, "max_seqlen_q": 8, "max_seqlen_kv": 8}
    return x, call


def normed(x, norm, kind, eps=1e-6):
    """The norm by its formula, in fp32."""
    x = x.float()
    if kind == "L2Normalization":
        return x / (x.square().sum(-1, keepdim=True) + eps).sqrt()
    if kind == "LayerNorm":
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight.float()
    return y + norm.bias.float() if kind == "LayerNorm" else y


def turned(x, layout, lengths, table):
    """RoPE by its formula: the halves of a head turned by the angles of its token's place, in fp32."""
    if layout == "thd":
        places = torch.cat([torch.arange(length) for length in lengths])[:, None]
    else:
        places = torch.arange(lengths[0])[:, None, None] if layout == "sbhd" else torch.arange(lengths[0])[:, None]
    angles = table[:, 0, 0].to(x.device)[places.to(x.device)]
    a, b = x.float().chunk(2, -1)
    return x.float() * angles.cos() + torch.cat((-b, a), -1) * angles.sin()


def projected(module, x, call, part):
    """The heads of q or k before anything happens to them, from the weights of the state dict."""
    if "encoder_output" not in call:
        owner, prefix = module.qkv, f"{part}_"
    elif part == "query":
        owner, prefix = module.query_layer, ""
    else:
        x, owner, prefix = call["encoder_output"], module.key_value, "key_"
    weight, bias = getattr(owner, f"{prefix}weight"), getattr(owner, f"{prefix}bias")
    return torch.nn.functional.linear(x, weight, bias).unflatten(-1, (-1, HEAD_DIM))


def q_and_k(module, x, call):
    """As the attention gets them."""
    seen = []
    hook = module.core_attention.register_forward_pre_hook(lambda _, args: seen.extend(args[:2]))
    module(x, **call)
    hook.remove()
    return seen


def close(actual, expected):
    torch.testing.assert_close(actual.float(), expected.float(), rtol=TOLERANCE, atol=TOLERANCE)


def check_norms(kind, before, layout, cross):
    module = attention(kind, before, layout, cross)
    norms = {"query": module.q_norm, "key": module.k_norm}
    assert all((norm is None) == (kind is None) for norm in norms.values())
    assert (module.q_norm is module.k_norm) == (kind in (None, "L2Normalization"))
    x, call = inputs(layout, cross, module.proj.weight.device)
    table = RotaryPositionEmbedding(HEAD_DIM)(8)
    for rotary in (None, table):
        if kind is None and rotary is None:
            continue  # q, k and v go on in one piece
        given = q_and_k(module, x, call if rotary is None else call | {"rotary_pos_emb": rotary.to(x.device)})
        for part, actual in zip(norms, given, strict=True):
            expected = projected(module, x, call, part)
            steps = [
                *([lambda y, part=part: normed(y, norms[part], kind)] if kind else []),
                *([lambda y, part=part: turned(y, layout, KEY_LENGTHS if cross and part == "key" else LENGTHS, table)]
                  if rotary is not None else []),
            ]  # fmt: skip
            for step in steps if before else reversed(steps):
                expected = step(expected)
            close(actual, expected)
    y = module(x, **call)
    y.float().square().sum().backward()
    assert y.shape == x.shape
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        if "norm.weight" in name:
            assert parameter.grad.abs().max() > 0, name


def check_saving(kind, before, layout, cross):
    module, other = attention(kind, before, layout, cross), attention(kind, before, layout, cross, seed=1)
    x, call = inputs(layout, cross, module.proj.weight.device)
    expected = module(x, **call)
    assert not torch.allclose(other(x, **call), expected)
    with io.BytesIO() as file:
        torch.save(module.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
    close(other(x, **call), expected)
    weights = {key for key in module.state_dict() if key.startswith(("q_norm.", "k_norm.")) and "_extra" not in key}
    parts = {"RMSNorm": ("weight",), "LayerNorm": ("weight", "bias")}.get(kind, ())
    assert weights == {f"{side}_norm.{part}" for side in "qk" for part in parts}


def check_layer(kind, layer_type):
    torch.manual_seed(0)
    layer = te.TransformerLayer(
        HIDDEN,
        2 * HIDDEN,
        HEADS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        layer_type=layer_type,
        qk_norm_type=kind,
        params_dtype=DTYPE,
    )
    attentions = [layer.self_attention, *([layer.inter_attention] if layer_type == "decoder" else [])]
    assert all((a.q_norm is None) == (kind is None) for a in attentions)
    device = layer.self_attention.proj.weight.device
    x = sequences("sbhd", (5, 5), device, 1)
    call = {"encoder_output": sequences("sbhd", (6, 6), device, 2)} if layer_type == "decoder" else {}
    with te.autocast(enabled=False):
        y = layer(x, **call)
    y.float().square().sum().backward()
    assert y.shape == x.shape and torch.isfinite(y).all()
    assert all(p.grad is not None for p in layer.parameters())


def main():
    count = 0
    for case in itertools.product(QK_NORM_TYPES, (False, True), ("sbhd", "bshd", "thd"), (False, True)):
        check_norms(*case)
        check_saving(*case)
        count += 2
    for case in itertools.product(QK_NORM_TYPES, ("encoder", "decoder")):
        check_layer(*case)
        count += 1
    print(f"{count} checks passed")


if __name__ == "__main__":
    main()
