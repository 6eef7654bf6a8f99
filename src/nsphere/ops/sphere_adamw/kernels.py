"""AdamW's step and the projection, or the projection alone, as two Triton kernels over many matrices at once.

A table on the device holds a row of pointers and sizes for each tensor, and a map says which tensor and which part of
it a program takes, so one launch serves all tensors of a kind. Rows (norms over dim 1, and weights without a norm) are
held in registers: every element is read once and written once. Columns (norms over dim 0) take two passes over a strip
of columns; the second finds the stepped weights in the L2 cache, where the first has just put them.
"""

import triton
import triton.language as tl

# the columns of the table
FIELDS = ("weight", "grad", "exp_avg", "exp_avg_sq", "rounded", "step", "num_rows", "num_columns", "num_elements")
WEIGHT, GRAD, EXP_AVG, EXP_AVG_SQ, ROUNDED, STEP = (tl.constexpr(i) for i in range(6))
NUM_ROWS, NUM_COLUMNS, NUM_ELEMENTS, NUM_FIELDS = (tl.constexpr(i) for i in range(6, 10))


@triton.jit
def _one_minus_power(log_beta, step):
    """1 - β^t without cancellation: e^x - 1 by its series where x is small."""
    x = step * log_beta
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))))))
    return tl.where(x > -0.5, series, 1 - tl.exp(x))


@triton.jit
def _pointer(table, tensor, field: tl.constexpr, kind: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table + tensor * NUM_FIELDS + field).to(tl.pointer_type(kind))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _stepped(w, at, inside, table, tensor, hyper, GRAD_TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """AdamW's new weights of one tile; the new moments are written."""
    lr, decay, beta1_rest, beta2, beta2_rest, log_beta1, log_beta2, eps, grad_factor = hyper
    m_ptr = _pointer(table, tensor, EXP_AVG, tl.float32, ALIGNED) + at
    v_ptr = _pointer(table, tensor, EXP_AVG_SQ, tl.float32, ALIGNED) + at
    step = tl.load(_pointer(table, tensor, STEP, tl.float32, False))
    g = tl.load(_pointer(table, tensor, GRAD, GRAD_TYPE, ALIGNED) + at, mask=inside, other=0.0).to(tl.float32)
    g = g * grad_factor
    m = tl.load(m_ptr, mask=inside, other=0.0)
    v = tl.load(v_ptr, mask=inside, other=0.0)
    m += beta1_rest * (g - m)
    v = beta2 * v + beta2_rest * g * g
    tl.store(m_ptr, m, mask=inside)
    tl.store(v_ptr, v, mask=inside)
    root = tl.sqrt(v) / tl.sqrt(_one_minus_power(log_beta2, step)) + eps
    return w * decay - lr / _one_minus_power(log_beta1, step) * (m / root)


@triton.jit
def _write(
    w, at, inside, table, tensor, seed, ROUNDED_TYPE: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr
):
    """The weights, and their rounded copy."""
    tl.store(_pointer(table, tensor, WEIGHT, tl.float32, ALIGNED) + at, w, mask=inside)
    if ROUNDED_TYPE is not None:
        if STOCHASTIC:
            # a bf16 is the upper half of an fp32: add a random lower half, cut the lower half off
            noise = tl.randint(seed + tensor, at.to(tl.int32)).to(tl.int32, bitcast=True) & 0xFFFF
            bits = (w.to(tl.int32, bitcast=True) + noise) & -65536
            w = tl.where(tl.abs(w) < float("inf"), bits.to(tl.float32, bitcast=True), w)
        copy = _pointer(table, tensor, ROUNDED, ROUNDED_TYPE, ALIGNED) + at
        tl.store(copy, w.to(ROUNDED_TYPE), mask=inside)


@triton.jit
def _inverse_length(square):
    """1/√square, correctly rounded to a unit or so; 1 of 0, so that a zero vector stays as it is."""
    return 1.0 / tl.sqrt(tl.where(square > 0, square, 1.0))


@triton.jit
def _grad_factor(grad_scale):
    """What takes GradScaler's factor out of the gradients."""
    factor = 1.0
    if grad_scale is not None:
        factor = 1.0 / tl.load(grad_scale)
    return factor


@triton.jit
def rows_kernel(
    table,
    parts,
    lr,
    decay,
    beta1_rest,
    beta2,
    beta2_rest,
    log_beta1,
    log_beta2,
    eps,
    seed,
    grad_scale,
    found_inf,
    TAKES_STEP: tl.constexpr,
    PROJECT: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    ROUNDED_TYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS rows of a tensor a program, the whole of each in registers."""
    if found_inf is not None:  # noqa: SIM102 - one is decided when compiling
        if tl.load(found_inf) != 0.0:
            return
    hyper = lr, decay, beta1_rest, beta2, beta2_rest, log_beta1, log_beta2, eps, _grad_factor(grad_scale)
    program = tl.program_id(0)
    tensor, part = tl.load(parts + 2 * program).to(tl.int64), tl.load(parts + 2 * program + 1).to(tl.int64)
    num_rows = tl.load(table + tensor * NUM_FIELDS + NUM_ROWS)
    num_columns = tl.load(table + tensor * NUM_FIELDS + NUM_COLUMNS)
    num_elements = tl.load(table + tensor * NUM_FIELDS + NUM_ELEMENTS)
    if ALIGNED:
        num_columns = tl.multiple_of(num_columns, 16)
    row = part * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    at = row * num_columns + column
    inside = (row < num_rows) & (column < num_columns) & (at < num_elements)
    pointer = _pointer(table, tensor, WEIGHT, WEIGHT_TYPE, ALIGNED) + at
    w = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    if TAKES_STEP:
        w = _stepped(w, at, inside, table, tensor, hyper, GRAD_TYPE, ALIGNED)
    if PROJECT:
        w = w * _inverse_length(tl.sum(w * w, 1))[:, None]
    if TAKES_STEP:
        _write(w, at, inside, table, tensor, seed, ROUNDED_TYPE, STOCHASTIC, ALIGNED)
    else:
        tl.store(pointer, w.to(WEIGHT_TYPE), mask=inside)


@triton.jit
def columns_kernel(
    table,
    parts,
    lr,
    decay,
    beta1_rest,
    beta2,
    beta2_rest,
    log_beta1,
    log_beta2,
    eps,
    seed,
    grad_scale,
    found_inf,
    TAKES_STEP: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    ROUNDED_TYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A strip of COLUMNS columns a program, ROWS rows at a time, twice: step and sum, then scale."""
    if found_inf is not None:  # noqa: SIM102 - one is decided when compiling
        if tl.load(found_inf) != 0.0:
            return
    hyper = lr, decay, beta1_rest, beta2, beta2_rest, log_beta1, log_beta2, eps, _grad_factor(grad_scale)
    program = tl.program_id(0)
    tensor, part = tl.load(parts + 2 * program).to(tl.int64), tl.load(parts + 2 * program + 1).to(tl.int64)
    num_rows = tl.load(table + tensor * NUM_FIELDS + NUM_ROWS)
    num_columns = tl.load(table + tensor * NUM_FIELDS + NUM_COLUMNS)
    if ALIGNED:
        num_columns = tl.multiple_of(num_columns, 16)
    first_row = tl.arange(0, ROWS)[:, None]
    column = part * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    pointer = _pointer(table, tensor, WEIGHT, WEIGHT_TYPE, ALIGNED)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for turn in range(tl.cdiv(num_rows, ROWS)):
        row = first_row + turn * ROWS
        at = row.to(tl.int64) * num_columns + column
        inside = (row < num_rows) & (column < num_columns)
        w = tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)
        if TAKES_STEP:
            w = _stepped(w, at, inside, table, tensor, hyper, GRAD_TYPE, ALIGNED)
            tl.store(pointer + at, w, mask=inside)
        squares += tl.where(inside, w * w, 0.0)
    tl.debug_barrier()
    inverse = _inverse_length(tl.sum(squares, 0))[None, :]
    for turn in range(tl.cdiv(num_rows, ROWS)):
        row = first_row + turn * ROWS
        at = row.to(tl.int64) * num_columns + column
        inside = (row < num_rows) & (column < num_columns)
        w = tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32) * inverse
        if TAKES_STEP:
            _write(w, at, inside, table, tensor, seed, ROUNDED_TYPE, STOCHASTIC, ALIGNED)
        else:
            tl.store(pointer + at, w.to(WEIGHT_TYPE), mask=inside)
