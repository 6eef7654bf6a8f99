"""Summaries of a comparison as `compare/summary.py` hands them over, made from formulas: quick to make."""

from __future__ import annotations

import math
import random
from typing import Any

from nsphere.report.curves import best_gpt_arm, headline_ratios, mean_curve, ratio_curve

MATRICES = ("W_q", "W_k", "W_v", "W_o", "W_u", "W_nu", "W_down")
TOKENS_PER_STEP = 4096

# name: (final loss, how slowly it falls, best learning rate, step ms, description)
SHAPES: dict[str, tuple[float, float, float, float, str]] = {
    "gpt": (1.264, 1.00, 1e-3, 236.0, "pre-RMSNorm, RoPE, SwiGLU, AdamW with weight decay 0.1"),
    "gpt-qknorm": (1.202, 0.90, 6e-4, 243.0, "the same with RMS QK-norm"),
    "gpt-qknorm-muon": (1.181, 0.62, 2e-2, 262.0, "the same with RMS QK-norm and Muon for matrices"),
    "ngpt": (1.162, 0.66, 2e-3, 259.0, "normalized transformer, eigen learning rates 1/L, s_z from 10"),
}


def summary(
    arms: tuple[str, ...] = ("gpt", "gpt-qknorm", "ngpt"),
    seeds: int = 1,
    steps: int = 600,
    layers: int = 4,
    sweep: bool = True,
    inspection: bool = True,
    final: dict[str, float] | None = None,
) -> dict[str, Any]:
    """A whole summary; `final` overrides an arm's final loss (to let nGPT lose, say)."""
    made = {name: _arm(name, seeds, steps, layers, sweep, inspection, (final or {}).get(name)) for name in arms}
    best = best_gpt_arm(made)
    return {
        "schema_version": 1,
        "arms": made,
        "best_gpt_arm": best,
        **headline_ratios(made, best),
        "max_norm_deviation": 2.4e-7 if "ngpt" in arms else None,
        "ratio_curve": ratio_curve(made, best),
        "environment": {
            "command": f"nsphere compare --arms {' '.join(arms)} --steps {steps} --out runs/demo",
            "nsphere": "0.1.0",
            "git_commit": "1db9c16f00dfeedbeef0000000000000000000000",
            "torch": "2.13.0+cpu",
            "python": "3.11.2",
            "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
            "cpu": "AMD EPYC 9R14",
            "num_threads": 2,
            "device": "cpu",
            "gpu": None,
            "dtype": "bfloat16 autocast",
            "compiled": True,
            "data": "stdlib",
            "data_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "seeds": list(range(seeds)),
            "date": "2026-11-22T04:20:29+00:00",
        },
        "config": {
            "d_model": 256,
            "num_layers": layers,
            "num_heads": 4,
            "context": 256,
            "batch_tokens": TOKENS_PER_STEP,
            "steps": steps,
            "eval_every": 50,
        },
        "limits": [
            "Scale: one model size (3.3 M parameters) on one data set; the ratio is known to depend on both.",
            f"Horizon: {steps} steps. The order of the arms at the end of a longer run may differ.",
            "Grid: learning rates are factors of 1.5 apart; a finer one may move a final loss by 0.005.",
        ],
    }


def distribution(mean: float, std: float, rng: random.Random, count: int = 256) -> dict[str, Any]:
    """Statistics and histogram of `count` values of a learned scale."""
    values = [rng.gauss(mean, std) for _ in range(count)]
    low, high = min(values), max(values)
    width = (high - low) / 24 or 1.0
    counts = [0] * 24
    for value in values:
        counts[min(23, int((value - low) / width))] += 1
    centre = math.fsum(values) / count
    return {
        "mean": centre,
        "std": math.sqrt(math.fsum((value - centre) ** 2 for value in values) / count),
        "min": low,
        "max": high,
        "histogram": {"edges": [low + i * width for i in range(25)], "counts": counts},
    }


def inspection(name: str, layers: int) -> dict[str, Any]:
    rng = random.Random(f"inspect {name}")
    sphere = name == "ngpt"
    made: list[dict[str, Any]] = []
    for i in range(layers):
        base = 8.0 if sphere else 900.0
        layer: dict[str, Any] = {
            "condition_numbers": {m: base * math.exp(rng.gauss(0.4 * (m in "W_q W_k"), 0.5)) for m in MATRICES},
            "max_attention_logit": {"gpt": 34.0, "gpt-qknorm": 13.0}.get(name, 17.0) * math.exp(rng.gauss(0, 0.2)),
        }
        if sphere:
            layer |= {
                "eigen_lr_attention": distribution(0.21 + 0.02 * i, 0.04, rng),
                "eigen_lr_mlp": distribution(0.30 + 0.03 * i, 0.06, rng),
                "s_qk": distribution(1.5 - 0.1 * i, 0.2, rng),
                "s_u": distribution(1.15, 0.1, rng, 1024),
                "s_v": distribution(1.1 + 0.05 * i, 0.12, rng, 1024),
            }
        made.append(layer)
    return {
        "layers": made,
        "s_z": distribution(22.0, 3.0, rng) if sphere else None,
        "max_norm_deviation": 2.4e-7 if sphere else None,
    }


def _curve(final: float, slowness: float, steps: int, rng: random.Random) -> dict[str, list[float]]:
    """Falls from 5.55 (256 bytes) to exactly `final`: a power law of the tokens, plus noise on the way."""
    at = [*range(0, steps, 50), steps]
    start, losses = 5.55, []
    for step in at:
        fraction = step / steps
        raw = (1 + 90 * fraction / slowness) ** -0.75
        end = (1 + 90 / slowness) ** -0.75
        noise = 0 if step in (0, steps) else rng.gauss(0, 0.004)
        losses.append(final + (start - final) * (raw - end) / (1 - end) + noise)
    return {"step": at, "tokens": [step * TOKENS_PER_STEP for step in at], "val_loss": losses}


def _arm(
    name: str, seeds: int, steps: int, layers: int, sweep: bool, inspected: bool, final: float | None
) -> dict[str, Any]:
    shape_final, slowness, lr, step_ms, description = SHAPES[name]
    final = shape_final if final is None else final
    runs = {}
    for seed in range(seeds):
        rng = random.Random(f"{name} {seed}")
        curve = _curve(final + (0.008 * (seed - (seeds - 1) / 2)), slowness, steps, rng)
        train = {"step": curve["step"][1:], "loss": [x + rng.gauss(0, 0.02) for x in curve["val_loss"][1:]]}
        runs[str(seed)] = {"final_val_loss": curve["val_loss"][-1], "curve": curve, "train_curve": train}
    mean = mean_curve({"seeds": runs})["val_loss"][-1]
    factors = [0.33, 0.5, 0.75, 1.0, 1.5, 2.5]
    return {
        "architecture": "ngpt" if name == "ngpt" else "gpt",
        "description": description,
        "final_val_loss": mean,
        "final_val_loss_spread": 0.008 * (seeds - 1) if seeds > 1 else None,
        "bits_per_byte": mean / math.log(2),
        "best_lr": lr,
        "tokens": steps * TOKENS_PER_STEP,
        "steps": steps,
        "step_time_ms_median": step_ms,
        "step_time_ms_spread": [step_ms * 0.97, step_ms * 1.06],
        "tokens_per_second": TOKENS_PER_STEP / step_ms * 1000,
        "peak_memory_bytes": 1.18e9 if name == "ngpt" else 1.12e9,
        "num_parameters": 3_289_344 if name == "ngpt" else 3_279_104,
        "train_seconds": steps * step_ms / 1000,
        "skipped_steps": 0,
        "seeds": runs,
        "lr_sweep": {
            "lr": [lr * f for f in factors],
            "val_loss": [mean + 0.09 * math.log(f) ** 2 for f in factors],
            "best_inside_grid": True,
        }
        if sweep
        else None,
        "lr_source": "swept here" if sweep else "tuned beforehand, see docs/demo-sweep.md",
        "sample": "def read(self, size=-1):\n    if size < 0:\n        return self._buffer & 0xff\n" * 3,
        "sample_prompt": "def read(",
        "inspection": inspection(name, layers) if inspected else None,
    }
