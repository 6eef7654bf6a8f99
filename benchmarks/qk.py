"""Does QKNorm in eager user code cost what the compiler makes of the formula?

Forward and backward of norm + RoPE of q and k: eager Hugging Face code (Qwen3's), torch.compile on the plain formula,
and nsphere's QKNorm called from eager code. Runs are interleaved, so that a busy machine slows all alike; medians.

    python benchmarks/qk.py [--rounds 30] [--threads N] [--device cpu]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

# a compilation that an earlier run left behind would make the first call look free
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import torch

from nsphere.qk_norm import QKNorm
from nsphere.rope import RopeSpec

BATCH, LENGTH, HEADS, KV_HEADS = 4, 1024, 16, 4


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


def arms(head_dim, dtype, device, weighted):
    """Name -> a function that runs forward and backward once."""
    generator = torch.Generator(device=device).manual_seed(0)

    def make(heads):
        x = torch.randn(BATCH, LENGTH, heads, head_dim, generator=generator, device=device)
        return x.to(dtype).requires_grad_(), torch.randn_like(x).to(dtype)

    (q, q_grad), (k, k_grad) = make(HEADS), make(KV_HEADS)
    rope = RopeSpec(head_dim)
    cos, sin = rope.tables(LENGTH, device=device)
    doubled = [torch.cat((t, t), -1).to(dtype).unsqueeze(0) for t in (cos, sin)]
    weights = [torch.ones(head_dim, device=device, requires_grad=True) for _ in range(2)]
    low_weights = [torch.ones(head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
    options = {} if weighted else {"weight": "none"}
    qk_norm = QKNorm("rms", head_dim=head_dim, rope=rope, **options).to(device)
    compiled = torch.compile(plain if weighted else plain_weightless)

    def step(function):
        def run():
            torch.autograd.backward(function(), (q_grad, k_grad))
            for t in (q, k, *weights, *low_weights, *qk_norm.parameters()):
                t.grad = None

        return run

    return {
        "hf eager": step(lambda: hf_eager(q, k, *low_weights, *doubled)),
        "torch.compile": step(lambda: compiled(q, k, *weights, cos, sin)),
        "nsphere": step(lambda: qk_norm(q, k, rope=(cos, sin))),
    }


def measure(functions, rounds, device):
    """Seconds of the first call, and the median of the others, by name."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    first, times = {}, {name: [] for name in functions}
    for name, run in functions.items():
        start = time.perf_counter()
        run()
        wait()
        first[name] = time.perf_counter() - start
        for _ in range(3):
            run()
    for i in range(rounds):
        for name, run in functions.items():
            if name == "hf eager" and i % 4:  # many times slower, and its ratio needs no such care
                continue
            wait()
            start = time.perf_counter()
            run()
            wait()
            times[name].append(time.perf_counter() - start)
    return first, {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "qk.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    print(f"(B{BATCH}, S{LENGTH}, Hq{HEADS}, Hkv{KV_HEADS}), forward + backward, median of {args.rounds}, ms")
    print(f"{'':24}{'hf eager':>10}{'compile':>10}{'nsphere':>10}{'/ compile':>11}{'/ eager':>9}{'first call':>12}")
    for head_dim in (64, 128):
        for dtype in (torch.float32, torch.bfloat16):
            for weighted in (True, False):
                first, medians = measure(arms(head_dim, dtype, args.device, weighted), args.rounds, args.device)
                eager, compiled, ours = (1e3 * medians[n] for n in ("hf eager", "torch.compile", "nsphere"))
                row = {
                    "head_dim": head_dim,
                    "dtype": str(dtype).removeprefix("torch."),
                    "weight": weighted,
                    "ms": {name: round(1e3 * t, 3) for name, t in medians.items()},
                    "first_call_s": {name: round(t, 2) for name, t in first.items()},
                    "over_compile": round(ours / compiled, 3),
                    "over_eager": round(ours / eager, 3),
                }
                rows.append(row)
                name = f"D{head_dim} {row['dtype']} {'weight' if weighted else 'bare'}"
                print(
                    f"{name:24}{eager:10.2f}{compiled:10.2f}{ours:10.2f}{ours / compiled:11.3f}{ours / eager:9.3f}"
                    f"{first['nsphere']:11.1f}s",
                    flush=True,
                )
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    args.out.parent.mkdir(exist_ok=True)
    record = {
        "machine": platform.processor() or platform.machine(),
        "threads": args.threads,
        "device": args.device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "shape": {"batch": BATCH, "length": LENGTH, "heads": HEADS, "kv_heads": KV_HEADS},
        "rounds": args.rounds,
        "rows": rows,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
