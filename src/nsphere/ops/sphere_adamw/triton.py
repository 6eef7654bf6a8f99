"""How the kernels of AdamW and projection are launched: tensors sorted by kind, a table of pointers, few launches.

Bytes moved per element in fp32: rows 28 (weight, gradient and both moments read, all but the gradient written), the
least there is; columns 36, of which 8, the stepped weight on its way to the second pass, meet the L2 cache.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from nsphere.ops.launch import Launch, next_power_of_2
from nsphere.ops.sphere_adamw.kernels import columns_kernel, rows_kernel
from nsphere.ops.sphere_adamw.reference import Step

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# elements of a program's tile, the columns of a strip (128 bytes in fp32), and the longest row that registers hold
TILE, STRIP, MAX_ROW = 2048, 32, 8192
# a weight without a norm is cut into rows of this many elements
PLAIN_ROW = 1024


class Tensors(NamedTuple):
    """One weight with what goes with it; all but the weight None where only the projection runs."""

    weight: Tensor
    dim: int | None
    grad: Tensor | None = None
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None
    rounded: Tensor | None = None
    step: Tensor | None = None


class Kind(NamedTuple):
    """What one launch has in common."""

    columns: bool
    """The norm is over dim 0."""
    project: bool
    weight: torch.dtype
    grad: torch.dtype | None
    rounded: torch.dtype | None
    width: int
    """Elements of a row, to the next power of two; of a strip where the norm is over dim 0."""
    aligned: bool
    """All pointers and row lengths are multiples of 16."""


def why_not(
    weights: Sequence[Tensor], dims: Sequence[int | None], moments: Sequence[Tensor] = (), others: Sequence[Tensor] = ()
) -> str | None:
    """The reason the kernels do not take these, None if they do."""
    for w, dim in zip(weights, dims, strict=True):
        if dim is not None and w.dim() != 2:
            return f"a weight of shape {tuple(w.shape)} with a norm is no matrix"
        if dim == 1 and w.shape[1] > MAX_ROW:
            return f"a row of {w.shape[1]} elements is more than a program holds ({MAX_ROW})"
        if type(w) not in (Tensor, torch.nn.Parameter):
            return f"a {type(w).__name__}; give its local tensor"
    for t in (*weights, *moments):
        if not t.is_contiguous():
            return f"a tensor of shape {tuple(t.shape)} and strides {t.stride()} is not contiguous"
    if any(m.dtype != torch.float32 for m in moments) or (moments and weights[0].dtype != torch.float32):
        return "AdamW in anything but fp32"
    for t in (*weights, *others):
        if t.dtype not in TYPES:
            return f"the kernels compute in fp32 and do not take {t.dtype}"
    return None


def kind_of(t: Tensors) -> Kind:
    """Which launch a weight belongs to."""
    columns = t.dim == 0
    width = STRIP if columns else PLAIN_ROW if t.dim is None else next_power_of_2(t.weight.shape[1])
    row = PLAIN_ROW if t.dim is None else t.weight.shape[1]
    parts = (t.weight, t.grad, t.exp_avg, t.exp_avg_sq, t.rounded)
    aligned = row % 16 == 0 and all(p is None or p.data_ptr() % 16 == 0 for p in parts)
    grad, rounded = (None if p is None else p.dtype for p in (t.grad, t.rounded))
    return Kind(columns, t.dim is not None, t.weight.dtype, grad, rounded, width, aligned)


def _row(t: Tensors) -> list[int]:
    """A weight's row of the table, see `kernels.FIELDS`."""
    n = t.weight.numel()
    pointers = [0 if p is None else p.data_ptr() for p in (*t[:1], *t[2:])]
    rows, columns = (-(-n // PLAIN_ROW), PLAIN_ROW) if t.dim is None else t.weight.shape
    return [*pointers, rows, columns, n]


def _tile(kind: Kind) -> tuple[int, int]:
    """(ROWS, COLUMNS) that a program holds."""
    return (TILE // STRIP, STRIP) if kind.columns else (max(1, TILE // kind.width), kind.width)


@functools.lru_cache(64)
def _parts(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """For each program its tensor and which part of it, int32 [programs, 2]."""
    tensor = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    part = torch.cat([torch.arange(n) for n in counts])
    return torch.stack((tensor, part), 1).to(torch.int32).to(device)


def launch_for(
    kind: Kind,
    members: Sequence[Tensors],
    table: Tensor,
    hyper: dict[str, Any],
    *,
    seed: int | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Launch:
    """One launch over all members."""
    rows, columns = _tile(kind)
    counts = []
    for t in members:
        num_rows, num_columns = (-(-t.weight.numel() // PLAIN_ROW), PLAIN_ROW) if t.dim is None else t.weight.shape
        counts.append(-(-num_columns // columns) if kind.columns else -(-num_rows // rows))
    parts = _parts(tuple(counts), table.device)
    arguments = {
        "table": table,
        "parts": parts,
        **hyper,
        # the kernel adds a tensor's number: seeds that follow each other, as steps' do, must not meet there
        "seed": 0 if seed is None else (seed * 1_000_003) & 0x7FFFFFFF,
        "grad_scale": grad_scale,
        "found_inf": found_inf,
        "TAKES_STEP": kind.grad is not None,
        "GRAD_TYPE": None if kind.grad is None else TYPES[kind.grad],
        "WEIGHT_TYPE": TYPES[kind.weight],
        "ROUNDED_TYPE": None if kind.rounded is None else TYPES[kind.rounded],
        "STOCHASTIC": seed is not None and kind.rounded == torch.bfloat16,
        "ALIGNED": kind.aligned,
        "ROWS": rows,
        "COLUMNS": columns,
    }
    if not kind.columns:
        arguments["PROJECT"] = kind.project
    kernel = columns_kernel if kind.columns else rows_kernel
    return Launch(kernel, (len(parts),), arguments, max(4, min(16, rows * columns // 256)))


NO_STEP = dict.fromkeys(("lr", "decay", "beta1_rest", "beta2", "beta2_rest", "log_beta1", "log_beta2", "eps"), 0.0)


def run(
    members: Sequence[Tensors],
    hyper: dict[str, Any],
    *,
    seed: int | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Sort the weights by kind and launch once for each kind."""
    kinds: dict[Kind, list[Tensors]] = {}
    for t in members:
        if t.weight.numel():
            kinds.setdefault(kind_of(t), []).append(t)
    for kind, same in kinds.items():
        table = torch.tensor([_row(t) for t in same], dtype=torch.int64).to(same[0].weight.device, non_blocking=True)
        launch_for(kind, same, table, hyper, seed=seed, grad_scale=grad_scale, found_inf=found_inf).run()


@torch.library.custom_op("nsphere::normalize_matrices_", mutates_args={"matrices"})
def normalize_matrices_(matrices: list[Tensor], dims: list[int]) -> None:
    """The projection of these matrices in place."""
    run([Tensors(w, dim) for w, dim in zip(matrices, dims, strict=True)], NO_STEP)


@torch.library.custom_op(
    "nsphere::sphere_adamw_", mutates_args={"weights", "exp_avgs", "exp_avg_sqs", "steps", "rounded"}
)
def sphere_adamw_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    dims: list[int],
    rounded: list[Tensor],
    rounded_of: list[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """The step in place; dims has -1 for no norm, and rounded_of for each weight its index in `rounded`, or -1."""
    if not weights:
        return
    torch._foreach_add_(steps, 1.0 if found_inf is None else (found_inf == 0).to(torch.float32))
    hyper = {
        "lr": lr,
        "decay": 1 - lr * weight_decay,
        "beta1_rest": 1 - beta1,
        "beta2": beta2,
        "beta2_rest": 1 - beta2,
        # e⁻²⁰⁰ is 0 in fp32, and the series that is not taken then stays finite
        "log_beta1": math.log(beta1) if beta1 > 0 else -200.0,
        "log_beta2": math.log(beta2) if beta2 > 0 else -200.0,
        "eps": eps,
    }
    members = [
        Tensors(
            weights[i],
            None if dims[i] < 0 else dims[i],
            grads[i].contiguous(),
            exp_avgs[i],
            exp_avg_sqs[i],
            None if rounded_of[i] < 0 else rounded[rounded_of[i]],
            steps[i],
        )
        for i in range(len(weights))
    ]
    run(members, hyper, seed=seed, grad_scale=grad_scale, found_inf=found_inf)


def step_(step: Step) -> None:
    """`nsphere.ops.sphere_adamw_` on a step that `why_not` has nothing against."""
    copies: list[Tensor] = []
    copy_of = []
    for copy in step.rounded:
        copy_of.append(-1 if copy is None else len(copies))
        copies += [] if copy is None else [copy]
    sphere_adamw_(
        [w.detach() for w in step.weights],
        list(step.grads),
        list(step.exp_avgs),
        list(step.exp_avg_sqs),
        list(step.steps),
        [-1 if dim is None else dim for dim in step.dims],
        copies,
        copy_of,
        float(step.lr),
        *step.betas,
        step.eps,
        step.weight_decay,
        step.rounding_seed,
        step.grad_scale,
        step.found_inf,
    )
