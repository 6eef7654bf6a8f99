"""Modules whose weights are split among the ranks of a tensor-parallel group, and which compute with their part.

A split weight is a DTensor, so that FSDP, checkpoints and optimizers know what it is a part of. The module computes
with the rank's own part, a plain tensor: its attribute gives that, so the module's code, the fused ops and the
compiler need not know. What crosses ranks is explicit and in `collectives`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from nsphere.collectives import Group, sum_statistic
from nsphere.multiplier import LearnedMultiplier
from nsphere.norms import StatisticNorm, compute_dtype, eps_of, inverse_root, is_plain
from nsphere.qk_norm import QKNorm, Tables
from nsphere.rope import rotate

View = Callable[[Tensor], Tensor]
"""From a rank's part of a weight to what the module computes with."""


def split(module: nn.Module, mesh: DeviceMesh, dims: Mapping[str, int], view: View | None = None) -> None:
    """Split a module's own parameters among the ranks of a mesh, in place.

    Args:
        module: its parameters are DTensors afterwards, and its attributes this rank's parts.
        mesh: of one axis.
        dims: parameter name -> the dim it is split along, evenly; the others are held whole by every rank.
        view: what the module computes with, from the rank's part; the part itself if not given.
    """
    held = dict(module.named_parameters(recurse=False))
    for name, p in held.items():
        placement = Shard(dims[name]) if name in dims else Replicate()
        # every rank made the same weights from the same seed: each keeps its part and nothing is sent
        part = distribute_tensor(p.detach(), mesh, [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(part, requires_grad=p.requires_grad))
    if held:
        parts = {name: property(_reader(name, view)) for name in held}
        module.__class__ = type(type(module).__name__, (type(module),), parts)


def _reader(name: str, view: View | None) -> Callable[[nn.Module], Tensor]:
    def part(module: nn.Module) -> Tensor:
        parameter: Any = module._parameters[name]
        if parameter.device_mesh.ndim > 1:  # split once more by FSDP, which asks for it itself
            return parameter
        own = parameter.to_local()
        return own if view is None else view(own)

    return part


def parallelize_qk_norm(qk_norm: QKNorm, mesh: DeviceMesh) -> None:
    """Make a QKNorm act on the heads of this rank alone, in place.

    Norms over a head need no communication. A norm over all heads sums its statistic over the ranks, q's and k's
    together. Weights per head are split with their heads; a weight that the heads share is held by every rank, and
    its gradient, of which each rank has the share of its heads, is the caller's to sum (as is that of weights of key
    heads that several ranks hold, where there are fewer of them than ranks).

    Args:
        qk_norm: with norms of the built-in family, with none, or over a head with any whose weights the heads share.
        mesh: of one axis, over which q's heads are split in order.

    Raises:
        ValueError: heads that the ranks can't share evenly, a norm or multiplier whose parts are unknown, or a norm
            over all heads on one side alone or that rounds between its steps.
    """
    ranks = mesh.size()
    heads, kv_heads = qk_norm.num_heads, qk_norm.num_kv_heads
    if heads is None or kv_heads is None:
        raise ValueError("a QKNorm that is split among ranks needs to know its heads; give num_heads")
    check_heads(heads, kv_heads, ranks)
    if isinstance(qk_norm.over, int) and qk_norm.over > qk_norm.head_dim:
        raise ValueError(f"over={qk_norm.over} spans heads of several ranks; use head or full")
    is_full = qk_norm.over == "full" and not (qk_norm.q_norm is None and qk_norm.k_norm is None)
    if is_full:
        _check_full_width(qk_norm)
    copies = max(1, ranks // kv_heads)
    for norm, rows, shared_by in ((qk_norm.q_norm, heads, 1), (qk_norm.k_norm, kv_heads, copies)):
        _split_norm(norm, qk_norm, rows, shared_by, mesh)
    for factor in (qk_norm.multiplier, qk_norm.k_multiplier):
        if isinstance(factor, LearnedMultiplier):
            per_head = factor.weight.dim() == 2 and factor.weight.shape[0] == heads > 1
            split(factor, mesh, {"weight": 0} if per_head else {})
        elif isinstance(factor, Tensor):
            raise ValueError("a multiplier that is a bare tensor can't be split among ranks; use LearnedMultiplier")
    qk_norm.num_heads, qk_norm.num_kv_heads = heads // ranks, max(1, kv_heads // ranks)
    if is_full:
        widths = heads * qk_norm.head_dim, kv_heads * qk_norm.head_dim
        qk_norm.__class__ = type(type(qk_norm).__name__, (_FullWidth, type(qk_norm)), {})
        qk_norm.group, qk_norm.widths, qk_norm.copies = mesh.get_group(), widths, copies  # type: ignore[assignment]


def _check_full_width(qk_norm: QKNorm) -> None:
    """Refuse what `_FullWidth`, which computes in fp32 and rounds once, would do otherwise than asked."""
    for norm in (qk_norm.q_norm, qk_norm.k_norm):
        if norm is None:
            raise ValueError("a norm over all heads of q or k alone can't be split among ranks; give both one, or tp 1")
        if not is_plain(norm):
            raise ValueError(
                f"{type(norm).__name__} over all heads is no built-in norm, so it is unknown what its ranks have to "
                'sum; use l2, rms or layer, over="head", or tp 1'
            )
        if norm.spec.weight_cast != "fused":
            raise ValueError(
                f"a norm over all heads with weight_cast={norm.spec.weight_cast!r} rounds between its steps, which "
                'ranks that share it do not; use "fused", or tp 1'
            )
    if qk_norm.multiplier_dtype != "float32" or qk_norm.multiplier_place != "last":
        raise ValueError(
            f'multiplier_dtype="{qk_norm.multiplier_dtype}" and multiplier_place="{qk_norm.multiplier_place}" can\'t '
            'be had with a norm over all heads that ranks share; use "float32" and "last", or tp 1'
        )


def check_heads(heads: int, kv_heads: int, ranks: int) -> None:
    """Raises ValueError where `ranks` can't share the heads evenly."""
    if heads % ranks:
        raise ValueError(f"num_heads {heads} is not divisible by tp {ranks}; choose a tp that divides it")
    if kv_heads % ranks and ranks % kv_heads:
        raise ValueError(
            f"num_kv_heads {kv_heads} and tp {ranks}: neither divides the other; choose a tp that divides it, or a "
            "multiple of it"
        )


def kv_rows(kv_heads: int, head_dim: int, mesh: DeviceMesh) -> slice:
    """Where there are fewer key heads than ranks: the rows of W_k and W_v of the one head that this rank uses."""
    head = mesh.get_local_rank() * kv_heads // mesh.size()
    return slice(head * head_dim, (head + 1) * head_dim)


def _split_norm(norm: nn.Module | None, owner: QKNorm, rows: int, shared_by: int, mesh: DeviceMesh) -> None:
    if norm is None:
        return
    if not is_plain(norm):
        _hold_whole(norm, owner, mesh)
        return
    kind = norm.spec.weight
    per_head = kind in ("per_head", "full", "scalar_per_head") or (kind == "shared" and owner.over == "full")
    names = [name for name, _ in norm.named_parameters(recurse=False)]
    if not per_head:
        split(norm, mesh, {})
    elif shared_by == 1:
        split(norm, mesh, dict.fromkeys(names, 0))
    else:
        head = mesh.get_local_rank() // shared_by
        split(norm, mesh, {}, lambda w: w.unflatten(0, (rows, -1))[head : head + 1].flatten(0, 1))
    if norm.num_heads is not None:
        norm.num_heads = norm.num_heads * max(1, rows // mesh.size()) // rows


def _hold_whole(norm: nn.Module, owner: QKNorm, mesh: DeviceMesh) -> None:
    """A norm of the user's own: over a head it acts on this rank's heads as on any, if its weights are of all heads."""
    name = type(norm).__name__
    for parameter, p in norm.named_parameters():
        if p.dim() > 1 or p.numel() > owner.head_dim:
            raise ValueError(
                f"{name}.{parameter} of shape {list(p.shape)} may differ from head to head, and it is unknown how "
                f"ranks split it; use a weight [{owner.head_dim}] that the heads share, or tp 1"
            )
    for module in norm.modules():
        split(module, mesh, {})


class _FullWidth(QKNorm):
    """A norm over all heads of all ranks: q's and k's sums of squares travel in one fp32 all-reduce.

    A LayerNorm's mean goes first, in one more: squares less their mean's square would cancel.
    """

    group: Group
    widths: tuple[int, int]
    copies: int

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        rope: Tables | None = None,
        *,
        k_rope: Tables | None = None,
        positions: Tensor | None = None,
        multiplier: Tensor | None = None,
        k_multiplier: Tensor | None = None,
    ) -> Tables:
        """As QKNorm's, of this rank's heads."""
        q, k = self._to_bshd(q, "q"), self._to_bshd(k, "k")
        k_rope = rope if k_rope is None else k_rope
        self._check(q, k, rope, k_rope)
        factors = (
            self._factors("q", q, self.multiplier, multiplier, positions),
            self._factors("k", k, self.k_multiplier, k_multiplier, positions),
        )
        dtype, wide = q.dtype, compute_dtype(q)

        def turn(x: Tensor, tables: Tables | None) -> Tensor:
            return x if tables is None or self.rope is None else rotate(x, *tables, self.rope)

        q, k = q.to(wide), k.to(wide)
        if self.place == "after":
            q, k = turn(q, rope), turn(k, k_rope)
        q, k = self._norm_pair(q, k, dtype)
        if self.place == "before":
            q, k = turn(q, rope), turn(k, k_rope)
        done = []
        for x, own, tensors in zip((q, k), (self.multiplier, self.k_multiplier), factors, strict=True):
            for factor in tensors:
                x = x * factor.to(wide)
            done.append((x * own if isinstance(own, int | float) else x).to(dtype))
        return self._from_bshd(done[0]), self._from_bshd(done[1])

    def _norm_pair(self, q: Tensor, k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        norms = [norm for norm in (self.q_norm, self.k_norm) if isinstance(norm, StatisticNorm)]
        rows = [q.flatten(-2), k.flatten(-2)]
        if any(norm.spec.statistic == "layer" for norm in norms):
            sums = self._sums([x.sum(-1, keepdim=True) for x in rows])
            means = [total / width for total, width in zip(sums, self.widths, strict=True)]
            centred = [norm.spec.statistic == "layer" for norm in norms]
            rows = [x - mean if c else x for x, mean, c in zip(rows, means, centred, strict=True)]
        sums = self._sums([x.pow(2).sum(-1, keepdim=True) for x in rows])
        done = []
        for x, norm, total, width in zip(rows, norms, sums, self.widths, strict=True):
            s = total if norm.spec.statistic == "l2" else total / width
            done.append(norm._affine(x * inverse_root(s, norm.spec, eps_of(norm.spec, dtype)), x.dtype))
        return done[0].view_as(q), done[1].view_as(k)

    def _sums(self, parts: list[Tensor]) -> tuple[Tensor, ...]:
        """Sums over the ranks; a key head that several ranks hold counts once."""
        shares = torch.cat([parts[0], parts[1] / self.copies], -1)
        return sum_statistic(shares, self.group).split(1, -1)
