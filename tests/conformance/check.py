"""What ours makes of a run of transformers' attention."""

import torch
from hf_attentions import Case, Run, raw

from nsphere import families, hf


def tables_of(r: Run) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The rotary module's tables; complex ones become (cos, sin)."""
    if r.tables is None:
        return None
    if isinstance(r.tables, torch.Tensor):
        return r.tables.real, r.tables.imag
    return next(iter(r.tables.values())) if isinstance(r.tables, dict) else r.tables


def ours(case: Case, r: Run, rounding="family", **options):
    """(q, k, v) as [B, heads, T, D], from the projections' outputs."""
    q, k, v = raw(case, r)
    qk = hf.qk_norm(r.module, rounding=rounding, rope=None if r.tables is not None else False, **options)
    tables = tables_of(r) if qk.rope is not None else None
    with torch.no_grad():
        q, k = qk(q, k, rope=tables, positions=r.positions)
        if families.get(hf.family_of(r.module)).v is not None:
            v = hf.v_norm(r.module, rounding=rounding)(v)
    if case.family == "deepseek_v4":  # k serves as v
        v = k
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
