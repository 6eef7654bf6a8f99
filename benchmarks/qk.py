"""Does QKNorm in eager user code cost what the compiler makes of the formula?

Forward and backward of norm + RoPE of q and k: eager Hugging Face code (Qwen3's), `F.rms_norm` and RoPE, eager and
compiled, torch.compile on the plain formula, Liger's kernels (on a GPU, where they are installed), and nsphere's QKNorm
called from eager code, by turns in one process; then how many graphs further lengths compile.

    python benchmarks/qk.py --json benchmarks/results/qk.json
"""

import importlib.util
import os
import time
from dataclasses import dataclass
from pathlib import Path

# a compilation that an earlier run left behind would make the first call look free
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import harness
import torch
import torch.nn.functional as F

from nsphere.qk_norm import QKNorm
from nsphere.rope import RopeSpec

BATCH, LENGTH, HEADS, KV_HEADS = 4, 1024, 16, 4
HF, COMPILED, OURS = "hf eager", "torch.compile", "nsphere"
RMS, RMS_COMPILED, LIGER = "F.rms_norm + RoPE", "F.rms_norm + RoPE, compiled", "liger"
# of ours over the others, at most
TARGETS = {COMPILED: 1.03, HF: 0.25}


@dataclass(frozen=True)
class Args:
    """QKNorm over torch.compile and over eager Hugging Face code."""

    rounds: int = 25
    """Calls of each that count."""
    device: str = "cpu"
    """cpu or cuda."""
    json: Path | None = None
    """Where to write the numbers."""


def hf_norm(x, weight, eps):
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def hf_rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def hf_eager(q, k, q_weight, k_weight, cos, sin):
    """As transformers' Qwen3 attention has it: tables [1, T, D] in the dtype of q."""
    q, k = hf_norm(q, q_weight, 1e-6).transpose(1, 2), hf_norm(k, k_weight, 1e-6).transpose(1, 2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q, k = q * cos + hf_rotate_half(q) * sin, k * cos + hf_rotate_half(k) * sin
    return q.transpose(1, 2), k.transpose(1, 2)


def plain(q, k, q_weight, k_weight, cos, sin):
    """The formula, fp32 inside, tables [T, D/2]."""
    return plain_side(q, q_weight, cos, sin), plain_side(k, k_weight, cos, sin)


def plain_side(x, weight, cos, sin):
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * weight
    a, b = y.chunk(2, -1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def plain_weightless(q, k, q_weight, k_weight, cos, sin):
    return plain_side(q, 1.0, cos, sin), plain_side(k, 1.0, cos, sin)


def rms_norm_rope(q, k, q_weight, k_weight, cos, sin):
    """The norm that torch has, then the rotation; weights (or None) and tables [T, D] in the dtype of q."""
    q, k = (F.rms_norm(x, x.shape[-1:], w, 1e-6) for x, w in ((q, q_weight), (k, k_weight)))
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return q * cos + hf_rotate_half(q) * sin, k * cos + hf_rotate_half(k) * sin


def liger(q, k, q_weight, k_weight, cos, sin):
    """Liger's RMSNorm (of rows [.., D]) and its rotation of [B, H, T, D]; Triton, so CUDA only."""
    from liger_kernel.transformers.functional import liger_rms_norm, liger_rope

    q, k = liger_rms_norm(q, q_weight, 1e-6).transpose(1, 2), liger_rms_norm(k, k_weight, 1e-6).transpose(1, 2)
    q, k = liger_rope(q, k, cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def why_no_liger(device, weighted):
    """The reason Liger is not among what is measured, None if it is."""
    if device != "cuda":
        return "its kernels are Triton's, for a GPU"
    if not weighted:
        return "its norm has a weight"
    return None if importlib.util.find_spec("liger_kernel") else "liger_kernel is not installed"


def inputs(length, head_dim, dtype, device):
    """Leaf q and k and a gradient for each, and the tables."""
    generator = torch.Generator(device=device).manual_seed(0)

    def make(heads):
        x = torch.randn(BATCH, length, heads, head_dim, generator=generator, device=device)
        return x.to(dtype).requires_grad_(), torch.randn_like(x).to(dtype)

    (q, q_grad), (k, k_grad) = make(HEADS), make(KV_HEADS)
    return (q, k), (q_grad, k_grad), RopeSpec(head_dim).tables(length, device=device)


def arms(head_dim, dtype, device, weighted):
    """Name -> a function that runs forward and backward once."""
    (q, k), grads, (cos, sin) = inputs(LENGTH, head_dim, dtype, device)
    doubled = [torch.cat((t, t), -1).to(dtype).unsqueeze(0) for t in (cos, sin)]
    weights = [torch.ones(head_dim, device=device, requires_grad=True) for _ in range(2)]
    low_weights = [torch.ones(head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
    qk_norm = our_module(head_dim, device, weighted)
    compiled = torch.compile(plain if weighted else plain_weightless)
    rms_weights, rms_tables = low_weights if weighted else [None, None], [t.squeeze(0) for t in doubled]
    rms_compiled = torch.compile(rms_norm_rope)

    def step(function):
        def run():
            torch.autograd.backward(function(), grads)
            for t in (q, k, *weights, *low_weights, *qk_norm.parameters()):
                t.grad = None

        return run

    if why_no_liger(device, weighted) is None:
        others = {LIGER: step(lambda: liger(q, k, *low_weights, *doubled))}
    else:
        others = {}
    return others | {
        HF: step(lambda: hf_eager(q, k, *low_weights, *doubled)),
        RMS: step(lambda: rms_norm_rope(q, k, *rms_weights, *rms_tables)),
        RMS_COMPILED: step(lambda: rms_compiled(q, k, *rms_weights, *rms_tables)),
        COMPILED: step(lambda: compiled(q, k, *weights, cos, sin)),
        OURS: step(lambda: qk_norm(q, k, rope=(cos, sin))),
    }


def our_module(head_dim, device, weighted):
    options = {} if weighted else {"weight": "none"}
    return QKNorm("rms", head_dim=head_dim, rope=RopeSpec(head_dim), **options).to(device)


def timed(run, device):
    """A function that runs once and returns the milliseconds."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def call():
        wait()
        start = time.perf_counter()
        run()
        wait()
        return {"ms": 1e3 * (time.perf_counter() - start)}

    return call


def graphs_by_length(head_dim, dtype, device):
    """How many graphs a new kind of call has compiled after each of several lengths."""
    qk_norm = QKNorm("rms", head_dim=head_dim, rope=RopeSpec(head_dim), eps=3e-6).to(device)
    torch._dynamo.utils.counters.clear()
    counted = {}
    for length in (LENGTH, LENGTH - 100, LENGTH // 2, LENGTH + 7):
        sides, grads, tables = inputs(length, head_dim, dtype, device)
        torch.autograd.backward(qk_norm(*sides, rope=tables), grads)
        counted[length] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return counted


def main(args):
    rows, results, missed = [], [], []
    for head_dim in (64, 128):
        for dtype in (torch.float32, torch.bfloat16):
            for weighted in (True, False):
                name = f"D{head_dim} {str(dtype).removeprefix('torch.')} {'weighted' if weighted else 'bare'}"
                calls = {
                    arm: timed(run, args.device) for arm, run in arms(head_dim, dtype, args.device, weighted).items()
                }
                first = {arm: call()["ms"] / 1e3 for arm, call in calls.items()}
                harness.interleave(calls, 3)
                ms = {arm: values["ms"] for arm, values in harness.interleave(calls, args.rounds).items()}
                over = {arm: harness.ratios(ms[OURS], ms[arm]) for arm in ms if arm != OURS}
                missed += [
                    f"{name}: {over[arm][1]:.3f} of {arm}" for arm, most in TARGETS.items() if over[arm][1] > most
                ]
                times = {arm: harness.quartiles(values) for arm, values in ms.items()}
                results.append(
                    {
                        "head_dim": head_dim,
                        "dtype": str(dtype).removeprefix("torch."),
                        "weighted": weighted,
                        "ms_quartiles": {arm: [round(x, 3) for x in q] for arm, q in times.items()},
                        "first_call_s": {arm: round(t, 2) for arm, t in first.items()},
                        "ratio_quartiles": {arm: [round(x, 3) for x in q] for arm, q in over.items()},
                    }
                )
                rows.append(
                    [
                        name,
                        f"{times[OURS][1]:.2f}",
                        *("{1:.3f} ({0:.3f}–{2:.3f})".format(*over[arm]) for arm in (COMPILED, HF, RMS, RMS_COMPILED)),
                        "{1:.3f} ({0:.3f}–{2:.3f})".format(*over[LIGER]) if LIGER in over else "–",
                        f"{first[OURS]:.1f}",
                    ]
                )
                print(*rows[-1], flush=True)
    graphs = graphs_by_length(64, torch.bfloat16, args.device)
    print(f"graphs compiled after lengths {graphs}; beyond targets: {missed or 'nothing'}")
    print(f"liger: {why_no_liger(args.device, True) or 'measured where the norm has a weight'}")
    over = [f"over {arm}" for arm in (COMPILED, HF, RMS, RMS_COMPILED, LIGER)]
    header = ["", "ours ms", *over, "first call s"]
    shape = f"B{BATCH} S{LENGTH} Hq{HEADS} Hkv{KV_HEADS}"
    title = f"norm + RoPE of q and k, forward + backward, {shape}, medians of {args.rounds}"
    harness.finish(title, header, rows, {"kinds": results, "graphs_by_length": graphs, "missed": missed}, args.json)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args, description=Args.__doc__))
