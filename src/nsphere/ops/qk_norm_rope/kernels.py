"""Norm, RoPE and multiplier of q and k as two Triton kernels, one launch forward and one backward.

A program takes a token, or walks over several, and a block of its heads. A head is held as its rotation pairs: two
tiles, the pairs' first members and their second ones, so that a rotation is four products, half and interleaved pairs
differ in their addresses alone, and dims that do not turn are pairs turned by nothing. Tiles are
[GROUPS, HEADS, PAIRS]: a statistic spans one group of HEADS heads (1, or all of them) and all pairs.

Shape legend: D head_dim, R rotated dims. All arithmetic is fp32.
"""

import dataclasses
from typing import Any, NamedTuple

import triton
import triton.language as tl


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is fixed when the kernel for one side, q or k, is compiled. Sizes of tiles are powers of two."""

    head_dim: int
    num_groups: int
    """Statistics per token."""
    heads: int
    """Heads that one statistic spans."""
    tile_groups: int
    tile_heads: int
    tile_pairs: int
    norm: str
    """"none", "l2", "rms" or "layer"."""
    norm_first: bool
    eps: float
    eps_place: str
    scale: float
    zero_centered: bool
    weight_strides: tuple[int, int, int]
    """How far apart the weights of two groups, of two heads of a group, and of two dims are; 0 where shared."""
    has_weight: bool
    has_bias: bool
    has_multiplier: bool
    multiplier_varies: bool
    """From token to token."""
    multiplier_per_head: bool
    rope: bool
    num_rotated: int
    """R/2, the pairs that turn."""
    first_rotated: int
    """The index of the first of them."""
    rope_start: int
    """The first rotated dim."""
    blocks: int
    sign: int
    table_per_head: bool
    layout_in: str
    layout_out: str
    from_output: bool
    """The backward gets the output and undoes the rotation, in place of the input."""
    wants_weight: bool = False
    wants_bias: bool = False
    wants_multiplier: bool = False

    @property
    def half(self) -> int:
        """All pairs of a head."""
        return self.head_dim // 2

    @property
    def norm_last(self) -> bool:
        """The norm comes after the rotation."""
        return not self.norm_first

    @property
    def one_run(self) -> bool:
        """Whether the second members of half pairs all lie half a head behind the first."""
        return self.num_rotated in (0, self.half) and self.blocks == 1

    @property
    def runs_of_8(self) -> bool:
        """Whether 8 pairs in a row lie in a row, each time, so that they can be loaded together."""
        return all(n % 8 == 0 for n in (self.rope_start, self.still_start, self.still_half, self.per_block))

    @property
    def still_start(self) -> int:
        """The first dim that does not turn."""
        return 0 if self.rope_start > 0 else 2 * self.num_rotated

    @property
    def still_half(self) -> int:
        """Half the dims that do not turn."""
        return self.half - self.num_rotated

    @property
    def per_block(self) -> int:
        """Pairs of one block."""
        return max(self.num_rotated // self.blocks, 1)

    @property
    def weight_per_group(self) -> bool:
        """Whether each group has weights of its own."""
        return self.weight_strides[0] != 0

    @property
    def weight_layout(self) -> str:
        """Where a weight's dims lie: those of the norm's side of the rotation."""
        return self.layout_in if self.norm_first else self.layout_out

    @property
    def saved_layout(self) -> str:
        """Where the dims of what the backward gets lie."""
        return self.layout_out if self.from_output else self.layout_in

    @property
    def eps_at_all(self) -> bool:
        """Whether eps is more than 0."""
        return self.eps > 0

    @property
    def width(self) -> int:
        """Elements that one statistic spans."""
        return self.heads * self.head_dim

    @property
    def padded(self) -> bool:
        """Whether a tile has more elements than a group."""
        return self.tile_heads * self.tile_pairs != self.heads * self.half


class Common(NamedTuple):
    """Pointers and strides that forward and backward read of one side."""

    inverse: Any
    cos: Any
    sin: Any
    weight: Any
    bias: Any
    multiplier: Any
    constant: Any
    table_batch: Any
    table_token: Any
    table_head: Any
    table_pair: Any
    multiplier_batch: Any
    multiplier_token: Any
    multiplier_head: Any
    multiplier_dim: Any


class Place(NamedTuple):
    """A tensor [B, T, H, D] whose last dim is contiguous."""

    ptr: Any
    batch: Any
    token: Any
    head: Any


class Sums(NamedTuple):
    """Where each program leaves its sums for the gradients of weight, bias and multiplier."""

    weight: Any
    bias: Any
    multiplier: Any


@triton.jit
def _groups(block, S: tl.constexpr):
    """The groups of this program, [GROUPS, 1, 1]."""
    return block * S.tile_groups + tl.arange(0, S.tile_groups)[:, None, None]


@triton.jit
def _heads(S: tl.constexpr):
    """The heads within a group, [1, HEADS, 1]."""
    return tl.arange(0, S.tile_heads)[None, :, None]


@triton.jit
def _pairs(S: tl.constexpr):
    """The pairs, [1, 1, PAIRS]."""
    return tl.arange(0, S.tile_pairs)[None, None, :]


@triton.jit
def _inside(block, S: tl.constexpr):
    """Which heads of the tile there are, [GROUPS, HEADS, 1]."""
    return (_groups(block, S) < S.num_groups) & (_heads(S) < S.heads)


@triton.jit
def _dims(S: tl.constexpr, layout: tl.constexpr):
    """The dims of the first and second members of all pairs, [1, 1, PAIRS]."""
    i = _pairs(S)
    if S.layout_in == "interleaved":
        if layout == "interleaved":
            first = 2 * i
            second = first + 1
        else:  # only what turns was put in half order
            j = i - S.first_rotated
            turns = (j >= 0) & (j < S.num_rotated)
            first = tl.where(turns, S.rope_start + (j // S.per_block) * 2 * S.per_block + j % S.per_block, 2 * i)
            second = tl.where(turns, first + S.per_block, 2 * i + 1)
    elif S.one_run:
        first = i
        second = first + S.half
    else:
        turns = i < S.num_rotated
        j = i - S.num_rotated
        first = tl.where(
            turns, S.rope_start + (i // S.per_block) * 2 * S.per_block + i % S.per_block, S.still_start + j
        )
        second = first + tl.where(turns, S.per_block, S.still_half)
        if S.runs_of_8:
            first = tl.max_contiguous(tl.multiple_of(first, [1, 1, 8]), [1, 1, 8])
            second = tl.max_contiguous(tl.multiple_of(second, [1, 1, 8]), [1, 1, 8])
    return first, second


@triton.jit
def _load(ptr, present, S: tl.constexpr, layout: tl.constexpr):
    """The two tiles at `ptr` [.., .., 1] as fp32, 0 where nothing is."""
    if layout == "interleaved":  # one contiguous load, parted in registers
        dim = tl.arange(0, 2 * S.tile_pairs)[None, None, :]
        both = tl.load(ptr + dim, mask=present & (dim < S.head_dim), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, [both.shape[0], both.shape[1], S.tile_pairs, 2]))
    else:
        first_dim, second_dim = _dims(S, layout)
        mask = present & (_pairs(S) < S.half)
        first = tl.load(ptr + first_dim, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(ptr + second_dim, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store(ptr, first, second, present, S: tl.constexpr, layout: tl.constexpr):
    kind = ptr.dtype.element_ty
    if layout == "interleaved":
        dim = tl.arange(0, 2 * S.tile_pairs)[None, None, :]
        tl.store(ptr + dim, tl.interleave(first, second).to(kind), mask=present & (dim < S.head_dim))
    else:
        first_dim, second_dim = _dims(S, layout)
        mask = present & (_pairs(S) < S.half)
        tl.store(ptr + first_dim, first.to(kind), mask=mask)
        tl.store(ptr + second_dim, second.to(kind), mask=mask)


@triton.jit
def _rows(place, batch, token, block, S: tl.constexpr):
    """Where the heads of this program begin in a tensor [B, T, H, D]."""
    head = (_groups(block, S) * S.heads + _heads(S)).to(tl.int64)
    return place.ptr + batch * place.batch + token * place.token + head * place.head


@triton.jit
def _load_weight(ptr, block, S: tl.constexpr):
    """A weight's two tiles, in the least shape that broadcasts to [GROUPS, HEADS, PAIRS]."""
    if S.weight_strides[0] == 0:
        base = ptr + _heads(S) * S.weight_strides[1]
        present = _heads(S) < S.heads
    else:
        base = ptr + _groups(block, S) * S.weight_strides[0] + _heads(S) * S.weight_strides[1]
        present = _inside(block, S)
    if S.weight_strides[2] == 0:
        first = tl.load(base, mask=present, other=0.0).to(tl.float32)
        second = first
    else:
        layout: tl.constexpr = S.weight_layout
        first, second = _load(base, present, S, layout)
    return first, second


@triton.jit
def _load_factor(s, block, S: tl.constexpr):
    """weight, or 1 + weight; ones without a weight."""
    if S.has_weight:
        first, second = _load_weight(s.weight, block, S)
        if S.zero_centered:
            first, second = 1.0 + first, 1.0 + second
    else:
        first = tl.full([1, 1, 1], 1.0, tl.float32)
        second = first
    return first, second


@triton.jit
def _load_bias(s, block, S: tl.constexpr):
    if S.has_bias:
        first, second = _load_weight(s.bias, block, S)
    else:
        first = tl.zeros([1, 1, 1], tl.float32)
        second = first
    return first, second


@triton.jit
def _load_multiplier(s, batch, token, block, S: tl.constexpr):
    """The multiplier's two tiles, of a tensor broadcast to [B, T, H, D] by its strides."""
    if S.has_multiplier:
        layout: tl.constexpr = S.layout_out
        base = s.multiplier + batch * s.multiplier_batch + token * s.multiplier_token
        first_dim, second_dim = _dims(S, layout)
        present = _pairs(S) < S.half
        if S.multiplier_per_head:
            head = (_groups(block, S) * S.heads + _heads(S)).to(tl.int64)
            base += head * s.multiplier_head
            present = present & _inside(block, S)
        first = tl.load(base + first_dim * s.multiplier_dim, mask=present, other=0.0).to(tl.float32)
        second = tl.load(base + second_dim * s.multiplier_dim, mask=present, other=0.0).to(tl.float32)
    else:
        first = tl.full([1, 1, 1], 1.0, tl.float32)
        second = first
    return first, second


@triton.jit
def _load_tables(s, batch, token, block, S: tl.constexpr):
    """Cos and sin of all pairs; 1 and 0 for those that do not turn."""
    if S.rope:
        pair = _pairs(S) - S.first_rotated
        base = batch * s.table_batch + token * s.table_token + pair * s.table_pair
        turns = (pair >= 0) & (pair < S.num_rotated)
        if S.table_per_head:
            base += (_groups(block, S) * S.heads + _heads(S)).to(tl.int64) * s.table_head
            turns = turns & _inside(block, S)
        cos = tl.load(s.cos + base, mask=turns, other=1.0).to(tl.float32)
        sin = tl.load(s.sin + base, mask=turns, other=0.0).to(tl.float32) * S.sign
    else:
        cos = tl.full([1, 1, 1], 1.0, tl.float32)
        sin = tl.zeros([1, 1, 1], tl.float32)
    return cos, sin


@triton.jit
def _turn(first, second, cos, sin):
    """The pairs turned by their angles; with -sin, turned back."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _sum(x):
    """Over what one statistic spans: [GROUPS, 1, 1]."""
    return tl.sum(tl.sum(x, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def _over_row(first, second, S: tl.constexpr):
    """The sum for L2, the mean for the others."""
    total = _sum(first + second)
    if S.norm != "l2":
        total = total / S.width
    return total


@triton.jit
def _centre(first, second, block, S: tl.constexpr):
    """The tiles less their mean."""
    mean = _sum(first + second) / S.width
    first, second = first - mean, second - mean
    if S.padded:
        inside = _inside(block, S) & (_pairs(S) < S.half)
        first, second = tl.where(inside, first, 0.0), tl.where(inside, second, 0.0)
    return first, second


@triton.jit
def _inverse_root(square, S: tl.constexpr):
    """1/root of a sum or mean of squares, with eps in its place; 0 where nothing keeps the root from being 0."""
    if S.eps_at_all:
        if S.eps_place == "inside":
            inverse = tl.rsqrt(square + S.eps)
        elif S.eps_place == "clamp":
            inverse = tl.where(square > 0, 1.0 / tl.maximum(tl.sqrt(square), S.eps), 0.0)
        else:
            inverse = tl.where(square > 0, 1.0 / (tl.sqrt(square) + S.eps), 0.0)
    else:
        inverse = tl.where(square > 0, tl.rsqrt(tl.where(square > 0, square, 1.0)), 0.0)
    return inverse


@triton.jit
def _standardise(first, second, block, S: tl.constexpr):
    """(x - centre) / root, and 1/root."""
    if S.norm == "layer":
        first, second = _centre(first, second, block, S)
    inverse = _inverse_root(_over_row(first * first, second * second, S), S)
    return first * inverse, second * inverse, inverse


@triton.jit
def _keep_inverse(inverse, s, token, block, S: tl.constexpr):
    group = _groups(block, S)
    tl.store(s.inverse + token * S.num_groups + group, inverse, mask=group < S.num_groups)


@triton.jit
def _forward_side(x, y, s, batch, token, row, block, f1, f2, b1, b2, m1, m2, S: tl.constexpr):
    """One token's heads of one side; f, b and m are the tiles of factor, bias and multiplier."""
    layout_in: tl.constexpr = S.layout_in
    layout_out: tl.constexpr = S.layout_out
    inside = _inside(block, S)
    cos, sin = _load_tables(s, batch, token, block, S)
    first, second = _load(_rows(x, batch, token, block, S), inside, S, layout_in)
    if S.norm_first:
        if S.norm != "none":
            first, second, inverse = _standardise(first, second, block, S)
            first, second = first * f1 * S.scale + b1, second * f2 * S.scale + b2
            _keep_inverse(inverse, s, row, block, S)
        first, second = _turn(first, second, cos, sin)
    else:
        first, second = _turn(first, second, cos, sin)
        if S.norm != "none":
            first, second, inverse = _standardise(first, second, block, S)
            first, second = first * f1 * S.scale + b1, second * f2 * S.scale + b2
            _keep_inverse(inverse, s, row, block, S)
    if S.multiplier_varies:
        m1, m2 = _load_multiplier(s, batch, token, block, S)
    first, second = first * m1 * s.constant, second * m2 * s.constant
    _store(_rows(y, batch, token, block, S), first, second, inside, S, layout_out)


@triton.jit
def _taken(u1, u2, n1, n2, inverse, S: tl.constexpr):
    """How much of u · n the statistic takes away again, per row of n."""
    along = _over_row(u1 * n1, u2 * n2, S)
    if S.eps_at_all:
        if S.eps_place == "clamp":
            # a clamped row's 1/root is 1/eps but for rounding
            along = tl.where(inverse < (1 - 5e-7) / S.eps, along, 0.0)
        elif S.eps_place == "added":
            # √s / (√s + eps) from n itself: 1 - eps/root cancels in short rows
            share = tl.sqrt(_over_row(n1 * n1, n2 * n2, S))
            along = tl.where(share > 0, along / tl.where(share > 0, share, 1.0), 0.0)
    return along


@triton.jit
def _backward_side(grad, saved, dx, s, batch, token, row, block, f1, f2, b1, b2, m1, m2, S: tl.constexpr):
    """Writes dx of one token's heads; returns their part of the gradients of weight, bias and multiplier."""
    layout_in: tl.constexpr = S.layout_in
    layout_out: tl.constexpr = S.layout_out
    saved_layout: tl.constexpr = S.saved_layout
    nothing = tl.zeros([1, 1, 1], tl.float32)
    dw1, dw2, db1, db2, dm1, dm2 = nothing, nothing, nothing, nothing, nothing, nothing
    inside = _inside(block, S)
    cos, sin = _load_tables(s, batch, token, block, S)
    g1, g2 = _load(_rows(grad, batch, token, block, S), inside, S, layout_out)
    g1, g2 = g1 * s.constant, g2 * s.constant
    if S.multiplier_varies:
        m1, m2 = _load_multiplier(s, batch, token, block, S)
    u1, u2 = g1 * m1, g2 * m2
    if S.norm == "none":
        if S.wants_multiplier:
            x1, x2 = _load(_rows(saved, batch, token, block, S), inside, S, layout_in)
            x1, x2 = _turn(x1, x2, cos, sin)
            dm1, dm2 = g1 * x1, g2 * x2
        d1, d2 = _turn(u1, u2, cos, -sin)
    else:
        group = _groups(block, S)
        inverse = tl.load(s.inverse + row * S.num_groups + group, mask=group < S.num_groups, other=0.0)
        n1, n2 = _load(_rows(saved, batch, token, block, S), inside, S, saved_layout)
        if S.from_output:
            shrink = 1.0 / (s.constant * S.scale)
            n1, n2 = n1 * shrink, n2 * shrink
            if S.norm_first:
                # tables that carry a factor are no exact rotation: the inverse is the transpose over cos² + sin²
                square = cos * cos + sin * sin
                undo = tl.where(square == 0.0, 0.0, 1.0 / tl.where(square == 0.0, 1.0, square))
                n1, n2 = _turn(n1 * undo, n2 * undo, cos, -sin)
        else:
            if S.norm_last:
                n1, n2 = _turn(n1, n2, cos, sin)
            if S.norm == "layer":
                n1, n2 = _centre(n1, n2, block, S)
            n1, n2 = n1 * inverse, n2 * inverse
        if S.norm_first:
            u1, u2 = _turn(u1, u2, cos, -sin)
        if S.wants_weight:
            dw1, dw2 = u1 * n1 * S.scale, u2 * n2 * S.scale
        if S.wants_bias:
            db1, db2 = u1, u2
        if S.wants_multiplier:
            z1, z2 = n1 * f1 * S.scale + b1, n2 * f2 * S.scale + b2
            if S.norm_first:
                z1, z2 = _turn(z1, z2, cos, sin)
            dm1, dm2 = g1 * z1, g2 * z2
        u1, u2 = u1 * f1 * S.scale, u2 * f2 * S.scale
        along = _taken(u1, u2, n1, n2, inverse, S)
        d1, d2 = u1 - n1 * along, u2 - n2 * along
        if S.norm == "layer":
            mean = _sum(u1 + u2) / S.width
            d1, d2 = d1 - mean, d2 - mean
        d1, d2 = d1 * inverse, d2 * inverse
        if S.norm_last:
            d1, d2 = _turn(d1, d2, cos, -sin)
    _store(_rows(dx, batch, token, block, S), d1, d2, inside, S, layout_in)
    return dw1, dw2, db1, db2, dm1, dm2


@triton.jit
def _no_sum(wanted: tl.constexpr, S: tl.constexpr):
    """The start of a sum over tokens: a tile, or a placeholder."""
    if wanted:
        start = tl.full([S.tile_groups, S.tile_heads, S.tile_pairs], 0.0, tl.float32)
    else:
        start = tl.zeros([1, 1, 1], tl.float32)
    return start


@triton.jit
def _no_sums(S: tl.constexpr):
    """The starts of all sums: weight, bias and multiplier, first and second members."""
    weight: tl.constexpr = S.wants_weight
    bias: tl.constexpr = S.wants_bias
    multiplier: tl.constexpr = S.wants_multiplier
    w, a, m = _no_sum(weight, S), _no_sum(bias, S), _no_sum(multiplier, S)
    return w, w, a, a, m, m


@triton.jit
def _leave(ptr, first, second, program, block, per_group: tl.constexpr, layout: tl.constexpr, S: tl.constexpr):
    """A program's sum goes into [programs, H, D], or, summed over its groups, into [programs · blocks, HEADS, D]."""
    if per_group:
        head = (_groups(block, S) * S.heads + _heads(S)).to(tl.int64)
        rows = ptr + (program * S.num_groups * S.heads + head) * S.head_dim
        _store(rows, first, second, _inside(block, S), S, layout)
    else:
        first, second = tl.sum(first, 0, keep_dims=True), tl.sum(second, 0, keep_dims=True)
        row = (program * tl.num_programs(1) + block) * S.heads + _heads(S)
        _store(ptr + row * S.head_dim, first, second, _heads(S) < S.heads, S, layout)


@triton.jit
def _leave_all(sums, w1, w2, a1, a2, m1, m2, program, block, S: tl.constexpr):
    """Those of weight, bias and multiplier that are wanted."""
    per_group: tl.constexpr = S.weight_per_group
    layout: tl.constexpr = S.weight_layout
    per_head: tl.constexpr = S.multiplier_per_head
    layout_out: tl.constexpr = S.layout_out
    if S.wants_weight:
        _leave(sums.weight, w1, w2, program, block, per_group, layout, S)
    if S.wants_bias:
        _leave(sums.bias, a1, a2, program, block, per_group, layout, S)
    if S.wants_multiplier:
        _leave(sums.multiplier, m1, m2, program, block, per_head, layout_out, S)


@triton.jit
def forward_kernel(q_x, q_y, q, k_x, k_y, k, num_tokens, length, Q: tl.constexpr, K: tl.constexpr):
    """Program (p, block) takes every num_programs-th token from p on, and a block of the heads of q and of k."""
    first, step, block = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.program_id(1)
    # what is the same for all tokens is loaded once; what is not, by each
    qf1, qf2 = _load_factor(q, block, Q)
    qb1, qb2 = _load_bias(q, block, Q)
    qm1, qm2 = _load_multiplier(q, 0, 0, block, Q)
    if K is not None:
        kf1, kf2 = _load_factor(k, block, K)
        kb1, kb2 = _load_bias(k, block, K)
        km1, km2 = _load_multiplier(k, 0, 0, block, K)
    for turn in range(tl.cdiv(num_tokens - first, step)):
        row = first + turn * step
        batch, token = row // length, row % length
        _forward_side(q_x, q_y, q, batch, token, row, block, qf1, qf2, qb1, qb2, qm1, qm2, Q)
        if K is not None:
            _forward_side(k_x, k_y, k, batch, token, row, block, kf1, kf2, kb1, kb2, km1, km2, K)


@triton.jit
def backward_kernel(
    q_grad,
    q_saved,
    q_dx,
    q,
    q_sums,
    k_grad,
    k_saved,
    k_dx,
    k,
    k_sums,
    num_tokens,
    length,
    Q: tl.constexpr,
    K: tl.constexpr,
):
    """As the forward kernel; each program keeps its sums for the parameters' gradients and leaves them in a row."""
    first, step, block = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.program_id(1)
    qf1, qf2 = _load_factor(q, block, Q)
    qb1, qb2 = _load_bias(q, block, Q)
    qm1, qm2 = _load_multiplier(q, 0, 0, block, Q)
    qw1, qw2, qa1, qa2, qs1, qs2 = _no_sums(Q)
    if K is not None:
        kf1, kf2 = _load_factor(k, block, K)
        kb1, kb2 = _load_bias(k, block, K)
        km1, km2 = _load_multiplier(k, 0, 0, block, K)
        kw1, kw2, ka1, ka2, ks1, ks2 = _no_sums(K)
    for turn in range(tl.cdiv(num_tokens - first, step)):
        row = first + turn * step
        batch, token = row // length, row % length
        w1, w2, a1, a2, s1, s2 = _backward_side(
            q_grad, q_saved, q_dx, q, batch, token, row, block, qf1, qf2, qb1, qb2, qm1, qm2, Q
        )
        qw1, qw2, qa1, qa2, qs1, qs2 = qw1 + w1, qw2 + w2, qa1 + a1, qa2 + a2, qs1 + s1, qs2 + s2
        if K is not None:
            w1, w2, a1, a2, s1, s2 = _backward_side(
                k_grad, k_saved, k_dx, k, batch, token, row, block, kf1, kf2, kb1, kb2, km1, km2, K
            )
            kw1, kw2, ka1, ka2, ks1, ks2 = kw1 + w1, kw2 + w2, ka1 + a1, ka2 + a2, ks1 + s1, ks2 + s2
    _leave_all(q_sums, qw1, qw2, qa1, qa2, qs1, qs2, first, block, Q)
    if K is not None:
        _leave_all(k_sums, kw1, kw2, ka1, ka2, ks1, ks2, first, block, K)
