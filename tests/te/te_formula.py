"""What Transformer Engine documents, written out in fp64 head by head, with nothing of the library."""

import math

import torch


def norm(x, kind, state, name, eps):
    """One row or many: x [..., D]."""
    if kind is None:
        return x
    if kind == "L2Normalization":
        return x / (x.pow(2).sum(-1, keepdim=True) + eps).sqrt()
    if kind == "RMSNorm":
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"]
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return y * state[f"{name}.weight"] + state[f"{name}.bias"]


def turn(x, angles, interleaved=False):
    """x [T, D], angles [T, R] with every dim's own angle."""
    out = x.clone()
    R = angles.shape[-1]
    for d in range(R):
        if interleaved:
            partner, sign = (d + 1, -1) if d % 2 == 0 else (d - 1, 1)
        else:
            partner, sign = (d + R // 2, -1) if d < R // 2 else (d - R // 2, 1)
        out[:, d] = x[:, d] * angles[: len(x), d].cos() + sign * x[:, partner] * angles[: len(x), d].sin()
    return out


def project(x, state, name, H, K, D, fused, interleaved, parts):
    """The named parts of x W + b, each a list of heads [T, D]; x [T, d]."""
    heads = {"query": H, "key": K, "value": K}
    if not fused:
        found = {}
        for part in parts:
            bare = f"{name}.{part}_weight" not in state  # cross-attention's query_layer
            w = state[f"{name}.weight" if bare else f"{name}.{part}_weight"]
            b = state.get(f"{name}.bias" if bare else f"{name}.{part}_bias", 0.0)
            found[part] = list((x @ w.T + b).split(D, -1))
        return found
    y = list((x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)).split(D, -1))
    found = {part: [] for part in parts}
    if interleaved:
        for _ in range(K):
            for part in parts:
                for _ in range(heads[part] // K):
                    found[part].append(y.pop(0))
    else:
        for part in parts:
            for _ in range(heads[part]):
                found[part].append(y.pop(0))
    assert not y
    return found


def attention(
    x,
    state,
    *,
    H,
    K,
    D,
    kind=None,
    eps=1e-6,
    before=False,
    angles=None,
    encoder=None,
    allowed=None,
    fused=False,
    interleaved=True,
    rotary_interleaved=False,
    scale=None,
    input_norm=None,
):
    """One sequence: x [T, d] (and encoder [S, d]) → [T, d]; allowed(i, j) says where a query may look."""
    scale = 1 / math.sqrt(D) if scale is None else scale
    prefix = "layernorm_" if input_norm else ""
    if input_norm:
        owner = f"layernorm_{'query' if encoder is not None else 'qkv'}"
        named = {"n.weight": state[f"{owner}.layer_norm_weight"], "n.bias": state.get(f"{owner}.layer_norm_bias")}
        x = norm(x, input_norm, named, "n", 1e-5)
    if encoder is None:
        parts = project(x, state, f"{prefix}qkv", H, K, D, fused, interleaved, ("query", "key", "value"))
    else:
        name = "layernorm_query" if input_norm else "query_layer"
        parts = project(x, state, name, H, K, D, fused, False, ("query",))
        parts |= project(encoder, state, "key_value", H, K, D, fused, interleaved, ("key", "value"))
    q_angles, k_angles = angles if isinstance(angles, tuple) else (angles, angles)

    def prepared(head, name, table):
        if before:
            head = norm(head, kind, state, name, eps)
        if table is not None:
            head = turn(head, table, rotary_interleaved)
        return head if before else norm(head, kind, state, name, eps)

    outputs = []
    for h in range(H):
        q = prepared(parts["query"][h], "q_norm", q_angles)
        k = prepared(parts["key"][h // (H // K)], "k_norm", k_angles)
        v = parts["value"][h // (H // K)]
        logits = scale * q @ k.T
        if allowed is not None:
            sees = torch.tensor([[bool(allowed(i, j)) for j in range(len(k))] for i in range(len(q))])
            logits = logits.masked_fill(~sees, -math.inf)
            weights = logits.softmax(-1).masked_fill(~sees.any(-1, keepdim=True), 0.0)
        else:
            weights = logits.softmax(-1)
        outputs.append(weights @ v)
    return torch.cat(outputs, -1) @ state["proj.weight"].T + state.get("proj.bias", 0.0)
