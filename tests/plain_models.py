"""GPT and nGPT as formulas over a state dict, written from the specification: what the modules are compared with.

Nothing is fused, folded or chunked, s_qk multiplies q and k each wherever both have as many heads, and the norm is a
plain quotient. Legend: B batch, T tokens, H query heads, K key/value heads, D head_dim, d d_model.
"""

import math

import torch
import torch.nn.functional as F


def norm(x, dim=-1):
    return x / x.pow(2).sum(dim, keepdim=True).sqrt()


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x_BTHD, base, document_ids=None):
    """True RoPE, pairs (i, i + D/2); cos and sin are rounded to fp32 once, as the library's tables are."""
    T, D = x_BTHD.shape[1], x_BTHD.shape[3]
    rows = [list(range(T))] if document_ids is None else [position_in_document(row) for row in document_ids.tolist()]
    angles = [[[p * base ** (-2 * i / D) for i in range(D // 2)] for p in row] for row in rows]
    angles = torch.tensor(angles, dtype=torch.float64)
    cos, sin = (f(angles).float().to(x_BTHD.dtype)[:, :, None] for f in (torch.cos, torch.sin))
    a, b = x_BTHD[..., : D // 2], x_BTHD[..., D // 2 :]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def position_in_document(ids):
    return [ids[:t].count(document) for t, document in enumerate(ids)]


def attend(q_BTHD, k_BTKD, v_BTKD, scale, document_ids=None):
    B, T, H, D = q_BTHD.shape
    group = H // k_BTKD.shape[2]
    heads = []
    for head in range(H):
        q, k, v = q_BTHD[:, :, head], k_BTKD[:, :, head // group], v_BTKD[:, :, head // group]
        scores = q @ k.transpose(1, 2) * scale
        seen = torch.ones(T, T, dtype=torch.bool).tril()
        if document_ids is not None:
            seen = seen & (document_ids[:, :, None] == document_ids[:, None, :])
        heads.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v)
    return torch.stack(heads, dim=2).reshape(B, T, H * D)


def effective(params, name, init, scale, size):
    """A scale's effective value, spread over its vector."""
    stored = params.get(f"{name}.stored")
    if stored is None:
        return torch.full((size,), init, dtype=torch.float64)
    return (stored * init / scale).expand(size)


def ngpt_logits(params, config, tokens, document_ids=None):
    """The paper's nGPT: equations 3, 10, 11 and 15 to 21."""
    c, d, H, K, D = config, config.d_model, config.num_heads, config.num_kv_heads, config.head_dim

    def matrix(name, dim):
        w = params[f"{name}.weight"]
        return norm(w, dim) if c.projection == "forward" else w

    h = matrix("embed", 1)[tokens]
    B, T = tokens.shape
    for i in range(c.num_layers):
        at = f"blocks.{i}"
        q, k, v = (h @ matrix(f"{at}.attn.{W}", 1).t() for W in ("W_q", "W_k", "W_v"))
        q, k, v = q.view(B, T, H, D), k.view(B, T, K, D), v.view(B, T, K, D)
        q, k = rotate(q, c.rope_base, document_ids), rotate(k, c.rope_base, document_ids)
        if c.qk_norm:
            q, k = norm(q), norm(k)
        s_qk = effective(params, f"{at}.attn.qk_norm.multiplier.s_qk", c.s_qk_init, c.s_qk_scale, H * D).view(H, D)
        q, k = (q * s_qk, k * s_qk) if H == K else (q * s_qk**2, k)
        o = attend(q, k, v, c.softmax_scale, document_ids) @ matrix(f"{at}.attn.W_o", 0).t()
        eigen_lr = effective(params, f"{at}.eigen_lr_attn", c.eigen_lr_init, c.eigen_lr_scale, d).abs()
        h = norm(h + eigen_lr * (norm(o) - h))

        s_u, s_nu = (
            effective(params, f"{at}.mlp.{W}.scale", c.s_uv_init, c.s_uv_scale, c.d_mlp) for W in ("W_u", "W_nu")
        )
        u = h @ matrix(f"{at}.mlp.W_u", 1).t() * s_u
        nu = h @ matrix(f"{at}.mlp.W_nu", 1).t() * s_nu * math.sqrt(d)
        o = (u * nu * torch.sigmoid(nu)) @ matrix(f"{at}.mlp.W_down", 0).t()
        eigen_lr = effective(params, f"{at}.eigen_lr_mlp", c.eigen_lr_init, c.eigen_lr_scale, d).abs()
        h = norm(h + eigen_lr * (norm(o) - h))
    s_z = effective(params, "head.scale", c.s_z_init, c.s_z_scale, c.vocab_size)
    return (h @ matrix("head", 1).t()) * s_z


def gpt_logits(params, config, tokens, document_ids=None):
    """Pre-RMSNorm, RoPE, SwiGLU; q and k normalised before RoPE where the config says so."""
    c, H, K, D = config, config.num_heads, config.num_kv_heads, config.head_dim
    h = params["embed.weight"][tokens]
    B, T = tokens.shape
    for i in range(c.num_layers):
        at = f"blocks.{i}"
        x = rms_norm(h, params[f"{at}.attn_norm.weight"], c.norm_eps)
        q, k, v = (x @ params[f"{at}.attn.{W}.weight"].t() for W in ("W_q", "W_k", "W_v"))
        q, k, v = q.view(B, T, H, D), k.view(B, T, K, D), v.view(B, T, K, D)
        scale = 1 / math.sqrt(D)
        if c.qk_norm == "rms":
            q = rms_norm(q, params[f"{at}.attn.qk_norm.q_norm.weight"], 1e-6)
            k = rms_norm(k, params[f"{at}.attn.qk_norm.k_norm.weight"], 1e-6)
        elif c.qk_norm == "l2":
            q, k, scale = norm(q), norm(k), math.sqrt(D)
        q, k = rotate(q, c.rope_base, document_ids), rotate(k, c.rope_base, document_ids)
        h = h + attend(q, k, v, scale, document_ids) @ params[f"{at}.attn.W_o.weight"].t()
        x = rms_norm(h, params[f"{at}.mlp_norm.weight"], c.norm_eps)
        u, nu = x @ params[f"{at}.mlp.W_u.weight"].t(), x @ params[f"{at}.mlp.W_nu.weight"].t()
        h = h + (u * nu * torch.sigmoid(nu)) @ params[f"{at}.mlp.W_down.weight"].t()
    h = rms_norm(h, params["final_norm.weight"], c.norm_eps)
    return h @ params["embed.weight" if c.tied else "head.weight"].t()


def leaves(model):
    """The model's parameters as separate leaves of the same values, under the same names."""
    return {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}


def perturb(model, seed=0):
    """Move every scale and norm weight off its start, some α below zero; matrices stay what they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.mul_(torch.empty_like(p).uniform_(0.5, 1.5, generator=generator))
                if "eigen_lr" in name:
                    p.mul_(torch.where(torch.rand(p.shape, generator=generator) < 1 / 3, -6.0, 6.0))
    return model


def compare(model, formula, tokens, targets, document_ids=None, rtol=1e-9, dead=None):
    """Assert that logits, loss and every gradient of an fp64 model are the formula's, zero where a name has `dead`."""
    params = leaves(model)
    expected = formula(params, model.config, tokens, document_ids)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    expected_grads = dict(zip(params, torch.autograd.grad(expected_loss, list(params.values())), strict=True))

    torch.testing.assert_close(model(tokens, document_ids), expected, rtol=rtol, atol=rtol)
    loss = model.loss(tokens, targets, document_ids)
    torch.testing.assert_close(loss, expected_loss, rtol=rtol, atol=0)
    model.zero_grad()
    loss.backward()
    for name, p in model.named_parameters():
        expected_grad = expected_grads[name]
        if dead is not None and dead in name:
            assert p.grad.abs().max() < 1e-12
            continue
        assert expected_grad.norm() > 0, f"{name} gets no gradient"
        torch.testing.assert_close(
            p.grad,
            expected_grad,
            rtol=rtol,
            atol=rtol * expected_grad.abs().max().item(),
            msg=lambda m, n=name: f"{n}: {m}",
        )
