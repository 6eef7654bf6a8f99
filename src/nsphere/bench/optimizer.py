"""What does the projection cost on top of AdamW, as a pass of its own and inside AdamW's?"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim import AdamW, Optimizer

from nsphere.bench import harness
from nsphere.bench.step import SIZES, SizeName
from nsphere.ops.backend import why_not
from nsphere.optim import SphereAdamW, keep_on_hypersphere
from nsphere.presets import make_model
from nsphere.train.config import model_config, resolve


@dataclass(frozen=True)
class Args:
    """One optimizer step for all of an nGPT's parameters: AdamW; AdamW, then the projection; SphereAdamW."""

    size: SizeName = "d512"
    """As in `nsphere bench step`."""
    rounds: int = 25
    """Steps of each that count."""
    json: Path | None = None
    """Where to write the numbers."""


def main(args: Args) -> None:
    """Measure, print, write."""
    size, device = SIZES[args.size], "cuda" if torch.cuda.is_available() else "cpu"
    initial = make_model(model_config("ngpt", resolve("ngpt", size.config), size.vocab_size)).to(device)

    backends = [None, *(b for b in ("triton",) if device == "cuda" and why_not(b, device) is None)]
    ours = {"SphereAdamW" + (f", {b}" if b else ""): b for b in backends}

    def build(kind: str) -> Optimizer:
        model = copy.deepcopy(initial)
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        options = {"lr": 1e-4, "betas": (0.9, 0.95)}
        if kind in ours:
            return SphereAdamW(model, **options, backend=ours[kind])  # type: ignore[arg-type]
        optimizer = AdamW(model.parameters(), **options, weight_decay=0, fused=True)  # type: ignore[arg-type]
        if kind == "AdamW, then projection":
            keep_on_hypersphere(model, optimizer)
        return optimizer

    optimizers = {kind: build(kind) for kind in ("AdamW", "AdamW, then projection", *ours)}
    num_parameters = sum(p.numel() for group in optimizers["AdamW"].param_groups for p in group["params"])
    source = torch.zeros(num_parameters, device=device)
    target = torch.empty_like(source)
    candidates = {kind: harness.milliseconds(o.step) for kind, o in optimizers.items()}
    candidates["copy of the parameters"] = harness.milliseconds(lambda: target.copy_(source))
    harness.interleave(candidates, 3)
    values = harness.interleave(candidates, args.rounds)
    results, rows = {}, []
    # reads of w, g, m, v and writes of w, m, v; the projection reads w, reads it again and writes it
    moved = {"AdamW": 28, "AdamW, then projection": 40, **dict.fromkeys(ours, 28), "copy of the parameters": 8}
    copy_rate = 8 * num_parameters / harness.quartiles(values["copy of the parameters"]["ms"])[1]
    for kind, bytes_each in moved.items():
        ms = harness.quartiles(values[kind]["ms"])
        over = harness.ratios(values[kind]["ms"], values["AdamW"]["ms"])
        share = bytes_each * num_parameters / ms[1] / copy_rate
        results[kind] = {"ms": ms, "over_adamw": over, "bytes_per_parameter": bytes_each, "share_of_copy_rate": share}
        rows.append([kind, harness.spread(ms), harness.spread(over), str(bytes_each), f"{share:.0%}"])
    header = ["step", "ms", "over AdamW", "bytes a parameter", "of a copy's rate"]
    title = f"optimizer step, {num_parameters:,} parameters"
    harness.finish(title, header, rows, results, args.json)
