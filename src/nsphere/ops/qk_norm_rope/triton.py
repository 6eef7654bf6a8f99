"""The op as Triton kernels: which calls they take, how they are launched, and their registration with torch.

What the backward keeps is what `lean` keeps. The ops are opaque to the compiler, see `normalized_update.triton`.
"""

import ast
import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from nsphere.norms import NormSpec, eps_of
from nsphere.ops.launch import Launch, next_power_of_2, persistent_programs, refuses_dtype, warps_for
from nsphere.ops.qk_norm_rope import reference
from nsphere.ops.qk_norm_rope.kernels import Common, Place, Shape, Sums, backward_kernel, forward_kernel
from nsphere.ops.qk_norm_rope.reference import SideSpec, SideTensors
from nsphere.rope import RopeSpec, pair_table

# elements of one side that a program holds at once, unless one statistic spans more
TILE = 4096
MAX_WIDTH = 32768
# Where no sums are kept 104 are the most that any kernel takes, and 16 warps fit with 128. Left to itself Triton 3.7's
# assembler comes down to 80 in some and has two numbers wait in memory for it
MAX_REGISTERS = 128
# eps and scale are passed as numbers: to a compiler that traces one function with several of them they are variables,
# which cannot be written down
_NORM_FIELDS = tuple(field.name for field in dataclasses.fields(NormSpec) if field.name not in ("eps", "scale"))
# the tables come made, and rounded, and the rotation is in fp32
_ROPE_FIELDS = ("dim", "layout", "where", "sign", "output", "twice", "blocks")


def why_not(sides: tuple[Tensor, ...], specs: tuple[SideSpec, ...], values: tuple[SideTensors, ...]) -> str | None:
    """The reason the kernels do not take this call, None if they do."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func"
    for x, spec, t in zip(sides, specs, values, strict=True):
        if isinstance(spec.over, tuple) or (isinstance(spec.over, int) and spec.over % x.shape[-1]):
            return f"over={spec.over}: a statistic of the kernels spans whole heads"
        if x.shape[-1] % 2:
            return f"a head of {x.shape[-1]} dims has no pairs"
        if next_power_of_2(_heads(spec, x.shape)) * next_power_of_2(x.shape[-1]) > MAX_WIDTH:
            return f"over={spec.over}: more than the {MAX_WIDTH} elements that a program holds"
        if spec.rope is not None and spec.rope.compute_dtype == torch.float64:
            return "a rotation in fp64"
        if any(table is not None and table.requires_grad for table in (t.cos, t.sin)):
            return "RoPE tables that need a gradient"
        if t.multiplier is not None and t.multiplier.requires_grad and _varies(t.multiplier):
            return "a multiplier that differs between tokens and needs a gradient"
        if isinstance(t.constant, Tensor):
            return "a constant that is a tensor"
        if reference.loses_the_input(spec, t):
            return "a factor of 0"
        reason = refuses_dtype(x, *(w for w in (t.weight, t.bias, t.cos, t.sin, t.multiplier) if w is not None))
        if reason is not None:
            return reason
    return None


def _heads(spec: SideSpec, shape: torch.Size) -> int:
    """Heads that one statistic spans, of an input of this shape."""
    if spec.norm is None or spec.over == "head":
        return 1
    return shape[-2] if spec.over == "full" else spec.over // shape[-1]  # type: ignore[operator]


def _varies(multiplier: Tensor) -> bool:
    """From token to token."""
    return any(n > 1 for n in multiplier.shape[:-2])


def encode(specs: tuple[SideSpec, ...]) -> str:
    """The specs as a Python literal, in which form an op of torch can take them; written so that it can be traced."""
    sides = [
        _literal([_fields(s.norm, _NORM_FIELDS), _fields(s.rope, _ROPE_FIELDS), repr(s.norm_first), repr(s.over)])
        for s in specs
    ]
    return _literal(sides)


def _fields(spec: Any, names: tuple[str, ...]) -> str:
    return "None" if spec is None else _literal([repr(getattr(spec, name)) for name in names])


def _literal(values: list[str]) -> str:
    return "[" + ", ".join(values) + "]"


@functools.lru_cache(256)
def decode(plan: str) -> tuple[SideSpec, ...]:
    """The inverse of `encode`, without eps and scale."""
    specs = []
    for norm, rope, norm_first, over in ast.literal_eval(plan):
        norm_spec = None if norm is None else NormSpec(eps=None, **dict(zip(_NORM_FIELDS, norm, strict=True)))
        rope_spec = None if rope is None else RopeSpec(**dict(zip(_ROPE_FIELDS, rope, strict=True)))
        specs.append(SideSpec(norm_spec, rope_spec, norm_first, over))
    return tuple(specs)


@dataclasses.dataclass(frozen=True)
class Side:
    """q or k of one call: the tensors, and the shape its kernel is compiled for."""

    x_shape: torch.Size
    spec: SideSpec
    t: SideTensors
    shape: Shape
    num_blocks: int
    """Into which its heads would be split, to be settled between q and k."""


def _side(
    x_shape: torch.Size, spec: SideSpec, t: SideTensors, eps: float, scale: float, wants: tuple[bool, ...]
) -> Side:
    num_heads, head_dim = x_shape[-2:]
    norm, rope = spec.norm, spec.rope
    heads = _heads(spec, x_shape)
    num_groups = num_heads // heads
    tile_heads, tile_pairs = next_power_of_2(heads), next_power_of_2(head_dim // 2)
    num_rotated = 0 if rope is None else rope.dim // 2
    rope_start = head_dim - rope.dim if rope is not None and rope.where == "trailing" else 0
    layout = "half" if rope is None else rope.layout
    kind = "none" if norm is None else norm.weight
    strides = {
        "shared": (0, head_dim, 1),
        "per_head": (heads * head_dim, head_dim, 1),
        "full": (heads * head_dim, head_dim, 1),
        "scalar_per_head": (1, 0, 0),
    }
    m = t.multiplier
    return Side(
        x_shape,
        spec,
        t,
        Shape(
            head_dim=head_dim,
            num_groups=num_groups,
            heads=heads,
            tile_groups=1,
            tile_heads=tile_heads,
            tile_pairs=tile_pairs,
            norm="none" if norm is None else norm.statistic,
            norm_first=spec.norm_first,
            eps=eps,
            eps_place="inside" if norm is None else norm.eps_place,
            scale=scale,
            zero_centered=norm is not None and norm.zero_centered,
            weight_strides=strides.get(kind, (0, 0, 0)),
            has_weight=t.weight is not None,
            has_bias=t.bias is not None,
            has_multiplier=m is not None,
            multiplier_varies=m is not None and _varies(m),
            multiplier_per_head=m is not None and m.dim() > 1 and m.shape[-2] > 1,
            rope=rope is not None,
            num_rotated=num_rotated,
            first_rotated=rope_start // 2 if layout == "interleaved" else 0,
            rope_start=rope_start,
            blocks=1 if rope is None else rope.blocks,
            sign=1 if rope is None else rope.sign,
            table_per_head=t.cos is not None and t.cos.dim() == 4 and t.cos.shape[2] > 1,
            layout_in=layout,
            layout_out="half" if rope is not None and rope.output == "half" else layout,
            from_output=reference.from_output(t),
            wants_weight=wants[0],
            wants_bias=wants[1],
            wants_multiplier=wants[2],
        ),
        -(-num_groups // max(1, TILE // (tile_heads * tile_pairs * 2))),
    )


def _settle(sides: list[Side]) -> tuple[list[Side], int]:
    """The sides with their tiles chosen, and the number of blocks into which the heads of each are split."""
    num_blocks = max(side.num_blocks for side in sides)
    settled = []
    for side in sides:
        tile_groups = next_power_of_2(-(-side.shape.num_groups // num_blocks))
        settled.append(dataclasses.replace(side, shape=dataclasses.replace(side.shape, tile_groups=tile_groups)))
    return settled, num_blocks


def _place(x: Tensor | None) -> Place:
    return Place(None, 0, 0, 0) if x is None else Place(x, *x.stride()[:3])


def _common(side: Side, inverse: Tensor | None) -> Common:
    t = side.t
    tables = (0, 0, 0, 0) if t.cos is None else _four_strides(t.cos)
    multiplier = (0, 0, 0, 0) if t.multiplier is None else _four_strides(t.multiplier)
    return Common(inverse, t.cos, t.sin, t.weight, t.bias, t.multiplier, float(t.constant), *tables, *multiplier)


def _four_strides(t: Tensor) -> tuple[int, ...]:
    """The strides of t broadcast to [B, T, H, D]: 0 along what it does not have, or has one of."""
    return (0,) * (4 - t.dim()) + tuple(0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True))


def _num_warps(sides: list[Side]) -> int:
    sizes = [2 * s.shape.tile_groups * s.shape.tile_heads * s.shape.tile_pairs for s in sides]
    return warps_for(max(sizes), per_thread=16)


def _num_programs(sides: list[Side], num_blocks: int, device: torch.device) -> int:
    """One for each token, unless each has something to load or to keep that tokens share."""
    num_tokens = sides[0].x_shape[0] * sides[0].x_shape[1]
    heavy = any(
        (s.shape.has_weight and s.shape.weight_per_group)
        or (s.shape.has_multiplier and s.shape.multiplier_per_head and not s.shape.multiplier_varies)
        or s.shape.wants_weight
        or s.shape.wants_bias
        or s.shape.wants_multiplier
        for s in sides
    )
    return -(-persistent_programs(num_tokens * num_blocks, device) // num_blocks) if heavy else num_tokens


def forward_launch(
    xs: list[Tensor], ys: list[Tensor], inverses: list[Tensor | None], sides: list[Side], num_blocks: int
) -> Launch:
    """Of one side or two."""
    arguments: dict[str, Any] = {"k_x": None, "k_y": None, "k": None, "K": None}
    for name, x, y, inverse, side in zip("qk", xs, ys, inverses, sides, strict=False):
        arguments |= {f"{name}_x": _place(x), f"{name}_y": _place(y), name: _common(side, inverse)}
        arguments |= {name.upper(): side.shape}
    batch, length = xs[0].shape[:2]
    arguments |= {"num_tokens": batch * length, "length": length}
    grid = (_num_programs(sides, num_blocks, xs[0].device), num_blocks)
    return Launch(forward_kernel, grid, arguments, _num_warps(sides), MAX_REGISTERS)


def backward_launch(
    grads: list[Tensor],
    saved: list[Tensor | None],
    dxs: list[Tensor],
    inverses: list[Tensor | None],
    sums: list[Sums],
    sides: list[Side],
    grid: tuple[int, int],
) -> Launch:
    """Of one side or two."""
    arguments: dict[str, Any] = dict.fromkeys(("k_grad", "k_saved", "k_dx", "k", "k_sums", "K"))
    for i, (name, side) in enumerate(zip("qk", sides, strict=False)):
        arguments |= {f"{name}_grad": _place(grads[i]), f"{name}_saved": _place(saved[i]), f"{name}_dx": _place(dxs[i])}
        arguments |= {name: _common(side, inverses[i]), f"{name}_sums": sums[i], name.upper(): side.shape}
    batch, length = grads[0].shape[:2]
    arguments |= {"num_tokens": batch * length, "length": length}
    keeps_sums = any(kept is not None for each in sums for kept in each)
    return Launch(backward_kernel, grid, arguments, _num_warps(sides), None if keeps_sums else MAX_REGISTERS)


def _empty_sums(side: Side, grid: tuple[int, int], like: Tensor) -> Sums:
    """Rows for the sums of every program, see `kernels._leave`."""
    s = side.shape

    def rows(wanted: bool, per_group: bool) -> Tensor | None:
        if not wanted:
            return None
        shape = (grid[0], s.num_groups * s.heads, s.head_dim) if per_group else (grid[0] * grid[1], s.heads, s.head_dim)
        return like.new_empty(shape, dtype=torch.float32)

    return Sums(
        rows(s.wants_weight, s.weight_per_group),
        rows(s.wants_bias, s.weight_per_group),
        rows(s.wants_multiplier, s.multiplier_per_head),
    )


def _weight_grad(rows: Tensor | None, w: Tensor | None, side: Side, like: Tensor) -> Tensor:
    """The programs' sums added up, in a fixed order, to a weight's shape."""
    if rows is None or w is None:
        return like.new_empty(0)
    total = rows.sum(0)
    if side.shape.weight_strides[2] == 0:  # one number for a group, or for all
        total = total.view(w.numel(), -1).sum(1)
    return total.reshape(w.shape).to(w.dtype)


def _multiplier_grad(rows: Tensor | None, m: Tensor | None, side: Side, like: Tensor) -> Tensor:
    if rows is None or m is None:
        return like.new_empty(0)
    total = rows.sum(0) if side.shape.multiplier_per_head else rows.sum((0, 1))
    flat = m.shape[-2:] if side.shape.multiplier_per_head else m.shape[-1:]
    return total.sum_to_size(flat).reshape(m.shape).to(m.dtype)


def _contiguous_heads(x: Tensor) -> Tensor:
    """A view if the last dim is contiguous, which it is in every layout and in packed projections; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_heads(x: Tensor) -> Tensor:
    """Of x's shape, and in its order of dims unless that does not end with a contiguous one, which kernels write."""
    made = torch.empty_like(x)
    return made if made.stride(-1) == 1 else x.new_empty(x.shape)


def _ready(t: SideTensors) -> SideTensors:
    """Weights as rows without gaps, tables with the same strides."""
    cos, sin = t.cos, t.sin
    if cos is not None and sin is not None and cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    weight, bias = (None if w is None else w.contiguous() for w in (t.weight, t.bias))
    return dataclasses.replace(t, weight=weight, bias=bias, cos=cos, sin=sin)


def _sides(
    xs: list[Tensor], plan: str, flat: tuple[Tensor | None, ...], numbers: tuple[float, ...], wanted: list[bool]
) -> tuple[list[Side], int]:
    sides = []
    for i, (x, spec) in enumerate(zip(xs, decode(plan), strict=True)):
        constant, eps, scale = numbers[3 * i : 3 * i + 3]
        t = _ready(SideTensors(*flat[5 * i : 5 * i + 5], constant))  # type: ignore[arg-type, call-arg]
        sides.append(_side(x.shape, spec, t, eps, scale, tuple(wanted[3 * i : 3 * i + 3])))
    return _settle(sides)


def _inverse_like(x: Tensor, side_spec: SideSpec) -> Tensor:
    """1/root of every statistic, [B · T, groups]; nothing without a norm."""
    if side_spec.norm is None:
        return x.new_empty(0, dtype=torch.float32)
    return x.new_empty((x.shape[0] * x.shape[1], x.shape[2] // _heads(side_spec, x.shape)), dtype=torch.float32)


@torch.library.custom_op("nsphere::qk_norm_rope", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    q_cos: Tensor | None,
    q_sin: Tensor | None,
    q_multiplier: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    k_cos: Tensor | None,
    k_sin: Tensor | None,
    k_multiplier: Tensor | None,
    q_constant: float,
    q_eps: float,
    q_scale: float,
    k_constant: float,
    k_eps: float,
    k_scale: float,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, 1/root of q, 1/root of k); k and what goes with it may be absent, and is then empty."""
    xs = [_contiguous_heads(x) for x in (q, k) if x is not None]
    ys = [_empty_heads(x) for x in (q, k) if x is not None]
    inverses = [_inverse_like(x, spec) for x, spec in zip(xs, decode(plan), strict=True)]
    flat = (q_weight, q_bias, q_cos, q_sin, q_multiplier, k_weight, k_bias, k_cos, k_sin, k_multiplier)
    if q.numel() or (k is not None and k.numel()):
        numbers = (q_constant, q_eps, q_scale, k_constant, k_eps, k_scale)
        sides, num_blocks = _sides(xs, plan, flat, numbers, [False] * 6)
        forward_launch(xs, ys, [i if i.numel() else None for i in inverses], sides, num_blocks).run()
    if k is None:
        return ys[0], q.new_empty(0), inverses[0], q.new_empty(0, dtype=torch.float32)
    return ys[0], ys[1], inverses[0], inverses[1]


@forward.register_fake
def _(q: Tensor, k: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    specs = decode(rest[-1])
    if k is None:
        return _empty_heads(q), q.new_empty(0), _inverse_like(q, specs[0]), q.new_empty(0, dtype=torch.float32)
    return _empty_heads(q), _empty_heads(k), _inverse_like(q, specs[0]), _inverse_like(k, specs[1])


@torch.library.custom_op("nsphere::qk_norm_rope_backward", mutates_args=())
def backward(
    q_grad: Tensor,
    k_grad: Tensor | None,
    q_saved: Tensor | None,
    k_saved: Tensor | None,
    q_inverse: Tensor | None,
    k_inverse: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    q_cos: Tensor | None,
    q_sin: Tensor | None,
    q_multiplier: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    k_cos: Tensor | None,
    k_sin: Tensor | None,
    k_multiplier: Tensor | None,
    q_constant: float,
    q_eps: float,
    q_scale: float,
    k_constant: float,
    k_eps: float,
    k_scale: float,
    plan: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients (q, its weight, bias, multiplier, k, its weight, bias, multiplier); empty where not `wanted`."""
    grads = [_contiguous_heads(g) for g in (q_grad, k_grad) if g is not None]
    saved = [None if x is None else _contiguous_heads(x) for x in (q_saved, k_saved)]
    dxs = [_empty_heads(g) for g in (q_grad, k_grad) if g is not None]
    flat = (q_weight, q_bias, q_cos, q_sin, q_multiplier, k_weight, k_bias, k_cos, k_sin, k_multiplier)
    results: list[Tensor] = []
    if not any(g.numel() for g in grads):
        for i, dx in enumerate(dxs):
            of_parameters = zip((flat[5 * i], flat[5 * i + 1], flat[5 * i + 4]), wanted[3 * i : 3 * i + 3], strict=True)
            results += [dx, *(torch.zeros_like(w) if wants else dx.new_empty(0) for w, wants in of_parameters)]  # type: ignore[arg-type]
    else:
        numbers = (q_constant, q_eps, q_scale, k_constant, k_eps, k_scale)
        sides, num_blocks = _sides(grads, plan, flat, numbers, wanted)
        grid = (_num_programs(sides, num_blocks, q_grad.device), num_blocks)
        sums = [_empty_sums(side, grid, q_grad) for side in sides]
        backward_launch(grads, saved, dxs, [q_inverse, k_inverse], sums, sides, grid).run()
        for dx, side, rows in zip(dxs, sides, sums, strict=True):
            results += [
                dx,
                _weight_grad(rows.weight, side.t.weight, side, dx),
                _weight_grad(rows.bias, side.t.bias, side, dx),
                _multiplier_grad(rows.multiplier, side.t.multiplier, side, dx),
            ]
    results += [q_grad.new_empty(0) for _ in range(8 - len(results))]
    return tuple(results)  # type: ignore[return-value]


@backward.register_fake
def _(q_grad: Tensor, k_grad: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    flat, wanted = rest[4:14], rest[-1]
    results = []
    for i, grad in enumerate((q_grad, k_grad)):
        if grad is None:
            results += [q_grad.new_empty(0) for _ in range(4)]
            continue
        of_parameters = zip((flat[5 * i], flat[5 * i + 1], flat[5 * i + 4]), wanted[3 * i : 3 * i + 3], strict=True)
        results.append(_empty_heads(grad))
        results += [w.new_empty(w.shape) if wants else grad.new_empty(0) for w, wants in of_parameters]
    return tuple(results)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, *flat = inputs[:12]
    ctx.numbers, ctx.plan = inputs[12:18], inputs[18]
    specs = decode(ctx.plan)
    kept: list[Tensor | None] = []
    for i, (x, y) in enumerate(zip((q, k), output[:2], strict=True)):
        from_output = reference.from_output(SideTensors(*flat[5 * i : 5 * i + 5]))
        kept.append(None if x is None or (from_output and specs[i].norm is None) else y if from_output else x)
    inverses = [i if i.numel() else None for i in output[2:]]
    ctx.save_for_backward(*kept, *inverses, *flat)
    ctx.shapes = tuple(None if x is None else x.shape for x in (q, k))


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    q_saved, k_saved, q_inverse, k_inverse, *flat = ctx.saved_tensors
    k_grad = None if ctx.shapes[1] is None else grads[1]
    needs = ctx.needs_input_grad[2:12]
    wanted = [flat[j] is not None and needs[j] for i in (0, 5) for j in (i, i + 1, i + 4)]
    dq, dqw, dqb, dqm, dk, dkw, dkb, dkm = backward(
        grads[0], k_grad, q_saved, k_saved, q_inverse, k_inverse, *flat, *ctx.numbers, ctx.plan, wanted
    )
    dqw, dqb, dqm, dkw, dkb, dkm = (
        g if wants else None for g, wants in zip((dqw, dqb, dqm, dkw, dkb, dkm), wanted, strict=True)
    )
    dk = dk if k_grad is not None else None
    return dq, dk, dqw, dqb, None, None, dqm, dkw, dkb, None, None, dkm, *[None] * 7


forward.register_autograd(_backward, setup_context=_setup)


def run(sides: tuple[Tensor, ...], specs: tuple[SideSpec, ...], values: tuple[SideTensors, ...]) -> tuple[Tensor, ...]:
    """The op on calls that `why_not` has nothing against."""
    flat: list[Tensor | None] = []
    for spec, t in zip(specs, values, strict=True):
        cos, sin = t.cos, t.sin
        if spec.rope is not None and cos is not None and sin is not None:
            cos, sin = (pair_table(table, spec.rope, torch.float32) for table in (cos, sin))
        flat += [t.weight, t.bias, cos, sin, t.multiplier]
    flat += [None] * (10 - len(flat))
    numbers: list[float] = []
    for x, spec, t in zip(sides, specs, values, strict=True):
        eps, scale = (0.0, 1.0) if spec.norm is None else (eps_of(spec.norm, x.dtype), spec.norm.scale)
        numbers += [float(t.constant), float(eps), float(scale)]
    numbers += [1.0, 0.0, 1.0] * (2 - len(values))
    k = sides[1] if len(sides) > 1 else None
    return forward(sides[0], k, *flat, *numbers, encode(specs))[: len(sides)]
