"""QK-norm against the attentions of diffusers and x-transformers: q and k as their kernels receive them.

Neither package is needed for anything else: `pip install diffusers x-transformers` has these tests run.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nsphere import families

B, T, H, D = 2, 6, 4, 32
WIDTH = H * D


class AtKernel(Exception):
    """The attention has reached its kernel."""


@pytest.fixture
def kernel(monkeypatch):
    def capture(query, key, value, *args, **kwargs):
        raise AtKernel(query, key)

    monkeypatch.setattr(F, "scaled_dot_product_attention", capture)


def fill(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    for p in module.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 1.0, 0.4)
        else:
            nn.init.normal_(p, 0.0, p.shape[-1] ** -0.5)
    return module.to(dtype).eval()


def share(qk: Any, norms: Any) -> None:
    """Give ours the weights of theirs."""
    for ours, theirs in zip((qk.q_norm, qk.k_norm), norms, strict=True):
        for name in ("weight", "bias"):
            if getattr(ours, name) is not None:
                getattr(ours, name).data = getattr(theirs, name).detach().clone()


def angles(width: int = D) -> torch.Tensor:
    return torch.arange(5, 5 + T).unsqueeze(-1) * 100.0 ** (-torch.arange(0, width, 2) / width)


def twice(pairs: bool, width: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) [T, width], every angle twice: side by side, or in two halves."""
    a = angles(width)
    a = a.repeat_interleave(2, -1) if pairs else torch.cat((a, a), -1)
    return a.cos(), a.sin()


def nothing(hidden: torch.Tensor) -> dict[str, Any]:
    return {}


def no_text(hidden: torch.Tensor) -> dict[str, Any]:
    return {"encoder_hidden_states": hidden[:, :0]}


def itself(hidden: torch.Tensor) -> dict[str, Any]:
    return {"encoder_hidden_states": hidden}


def ltx_tables() -> tuple[torch.Tensor, torch.Tensor]:
    """LTX's own, over all heads together, of a clip of 6 places."""
    ltx = importlib.import_module("diffusers.models.transformers.transformer_ltx")
    return ltx.LTXVideoRotaryPosEmbed(WIDTH)(torch.zeros(B, T, WIDTH), num_frames=1, height=2, width=3)


def heads_apart() -> tuple[torch.Tensor, torch.Tensor]:
    """Mochi's kind: every head has frequencies of its own."""
    a = angles().unsqueeze(1) * torch.linspace(0.5, 2.0, H).unsqueeze(-1)
    return a.cos(), a.sin()


@dataclasses.dataclass(frozen=True)
class Case:
    """One family of diffusers."""

    family: str
    module: str
    """Where attention and processor are, below diffusers.models."""
    attention: str = "Attention"
    processor: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    keywords: Callable[[torch.Tensor], dict[str, Any]] = nothing
    tables: Callable[[], Any] | None = None
    """What the processor takes as image_rotary_emb."""
    ours: Callable[[Any], tuple[torch.Tensor, torch.Tensor]] = lambda tables: tables
    """Those tables as ours takes them."""
    tables_name: str = "image_rotary_emb"


def interleaved() -> tuple[torch.Tensor, torch.Tensor]:
    return twice(pairs=True)


def halves() -> tuple[torch.Tensor, torch.Tensor]:
    return twice(pairs=False)


def complex_tables() -> torch.Tensor:
    return torch.polar(torch.ones(B, T, D // 2), angles().expand(B, T, D // 2))


def as_real(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return z.real, z.imag


def per_head(tables: Any) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = tables
    return cos.unflatten(-1, (H, D)), sin.unflatten(-1, (H, D))


BLOCK = {"query_dim": WIDTH, "heads": H, "dim_head": D}
CASES = [
    Case("flux", "transformers.transformer_flux", "FluxAttention", "FluxAttnProcessor",
         {**BLOCK, "eps": 1e-6}, nothing, interleaved),
    Case("flux2", "transformers.transformer_flux2", "Flux2Attention", "Flux2AttnProcessor",
         {**BLOCK, "eps": 1e-6}, nothing, interleaved),
    Case("wan", "transformers.transformer_wan", "WanAttention", "WanAttnProcessor",
         {"dim": WIDTH, "heads": H, "dim_head": D, "eps": 1e-6}, nothing,
         lambda: tuple(t[None, :, None] for t in interleaved()), lambda t: tuple(x[0, :, 0] for x in t), "rotary_emb"),
    Case("ltx", "transformers.transformer_ltx", "LTXAttention", "LTXVideoAttnProcessor",
         {**BLOCK, "kv_heads": H}, nothing, ltx_tables, per_head),
    Case("cogvideox", "attention_processor", processor="CogVideoXAttnProcessor2_0",
         options={**BLOCK, "qk_norm": "layer_norm", "eps": 1e-6}, keywords=no_text, tables=interleaved),
    Case("hunyuan_dit", "attention_processor", processor="HunyuanAttnProcessor2_0",
         options={**BLOCK, "qk_norm": "layer_norm", "eps": 1e-6}, tables=interleaved),
    Case("cogview4", "transformers.transformer_cogview4", processor="CogView4AttnProcessor",
         options={**BLOCK, "qk_norm": "layer_norm", "elementwise_affine": False, "eps": 1e-5}, keywords=no_text,
         tables=halves),
    Case("cosmos", "transformers.transformer_cosmos", processor="CosmosAttnProcessor2_0",
         options={**BLOCK, "qk_norm": "rms_norm", "elementwise_affine": True}, tables=halves),
    Case("lumina2", "transformers.transformer_lumina2", processor="Lumina2AttnProcessor2_0",
         options={**BLOCK, "kv_heads": H, "qk_norm": "rms_norm", "eps": 1e-5}, keywords=itself,
         tables=complex_tables, ours=as_real),
    Case("z_image", "transformers.transformer_z_image", processor="ZSingleStreamAttnProcessor",
         options={**BLOCK, "qk_norm": "rms_norm", "eps": 1e-5}, tables=complex_tables, ours=as_real,
         tables_name="freqs_cis"),
    Case("sd3_5", "attention_processor", processor="JointAttnProcessor2_0",
         options={**BLOCK, "qk_norm": "rms_norm", "eps": 1e-6}),
    Case("diffusers_rms_norm", "transformers.transformer_hunyuan_video", processor="HunyuanVideoAttnProcessor2_0",
         options={**BLOCK, "added_kv_proj_dim": WIDTH, "context_pre_only": False, "qk_norm": "rms_norm", "eps": 1e-6},
         keywords=no_text, tables=interleaved),
    Case("diffusers_fp32_layer_norm", "attention_processor", processor="AuraFlowAttnProcessor2_0",
         options={**BLOCK, "qk_norm": "fp32_layer_norm", "eps": 1e-5}),
    Case("diffusers_layer_norm_across_heads", "attention_processor", processor="LuminaAttnProcessor2_0",
         options={**BLOCK, "kv_heads": H, "qk_norm": "layer_norm_across_heads"},
         keywords=lambda h: {**itself(h), "key_rotary_emb": complex_tables(), "attention_mask": torch.ones(B, T)},
         tables=complex_tables, ours=as_real, tables_name="query_rotary_emb"),
    Case("mochi", "transformers.transformer_mochi", "MochiAttention", "MochiAttnProcessor2_0",
         {**BLOCK, "added_kv_proj_dim": WIDTH, "eps": 1e-5},
         lambda h: {**no_text(h), "attention_mask": torch.ones(B, 0)}, heads_apart,
         lambda t: tuple(x.unsqueeze(0) for x in t)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.family)
def test_diffusers(case, kernel):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    source = importlib.import_module(f"diffusers.models.{case.module}")
    for dtype in (torch.float32, torch.bfloat16):
        for scale in (1.0, 1e-3):
            attention = fill(
                getattr(source, case.attention)(**case.options, processor=getattr(source, case.processor)()), dtype
            )
            hidden = (torch.randn(B, T, WIDTH) * scale).to(dtype)
            tables = None if case.tables is None else case.tables()
            keywords = {} if tables is None else {case.tables_name: tables}
            with torch.no_grad(), pytest.raises(AtKernel) as reached:
                attention(hidden, **case.keywords(hidden), **keywords)
            qk = families.qk_norm(case.family, head_dim=D, num_heads=H, rope=tables is not None)
            share(qk, (attention.norm_q, attention.norm_k))
            with torch.no_grad():
                q, k = (to(hidden).unflatten(-1, (H, D)) for to in (attention.to_q, attention.to_k))
                got = qk(q, k, rope=None if tables is None else case.ours(tables))
            for ours, theirs in zip(got, reached.value.args, strict=True):
                theirs = theirs.transpose(1, 2)
                ours = ours[: len(theirs)]  # Mochi calls its kernel for one sequence at a time
                assert ours.dtype == theirs.dtype == dtype
                assert torch.equal(ours, theirs), f"{(ours != theirs).float().mean():.1%} differ ({dtype}, {scale})"
            assert qk.softmax_scale == pytest.approx(D**-0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm_groups": 2}, {"qk_norm_dim_scale": True}, {"qk_rmsnorm": True}], ids=str
)
def test_x_transformers(options, dtype, monkeypatch):
    package = pytest.importorskip("x_transformers", reason="x-transformers is not installed")
    width = 16  # its root is a power of two, so that the order of two factors does not show
    attention = package.x_transformers.Attention(
        WIDTH, heads=H, dim_head=width, **{"qk_norm": "qk_rmsnorm" not in options, **options}
    )
    fill(attention, dtype)
    for p in attention.parameters():
        if p.dim() == 3:
            nn.init.normal_(p, 0.5, 0.3)

    def capture(q, k, *args, **kwargs):
        raise AtKernel(q, k)

    monkeypatch.setattr(attention.attend, "forward", capture)
    hidden = torch.randn(B, T, WIDTH).to(dtype)
    with torch.no_grad(), pytest.raises(AtKernel) as reached:
        attention(hidden, rotary_pos_emb=(angles(width).repeat_interleave(2, -1).unsqueeze(0), 1.0))
    if "qk_rmsnorm" in options:
        qk = families.qk_norm("x_transformers_rmsnorm", head_dim=width, num_heads=H)
        weights = [norm.gamma for norm in (attention.q_rmsnorm, attention.k_rmsnorm)]
    else:
        name = "x_transformers_dim_scale" if "qk_norm_dim_scale" in options else "x_transformers"
        over = width // options.get("qk_norm_groups", 1)
        qk = families.qk_norm(name, head_dim=width, num_heads=H, over=over if over < width else None)
        weights = [attention.qk_norm_q_scale, attention.qk_norm_k_scale]
    for ours, theirs in zip((qk.q_norm, qk.k_norm), weights, strict=True):
        if ours.weight is not None:
            ours.weight.data = theirs.detach().reshape(H, width).clone()
    with torch.no_grad():
        raw = (to(hidden).unflatten(-1, (H, width)) for to in (attention.to_q, attention.to_k))
        got = qk(*raw, rope=twice(pairs=True, width=width))
    for ours, theirs in zip(got, reached.value.args, strict=True):
        assert ours.dtype == theirs.dtype == dtype and torch.equal(ours, theirs.transpose(1, 2))
    assert qk.softmax_scale == pytest.approx(attention.attend.scale)
