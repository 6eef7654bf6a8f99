"""What does the projection cost on top of AdamW, as a pass of its own and inside AdamW's?"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim import AdamW, Optimizer

from nsphere.bench import harness
from nsphere.bench.step import SIZES, SizeName
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
    config = model_config("ngpt", resolve("ngpt", size.config), size.vocab_size)

    def build(kind: str) -> Optimizer:
        model = make_model(config).to(device)
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        options = {"lr": 1e-4, "betas": (0.9, 0.95)}
        if kind == "SphereAdamW":
            return SphereAdamW(model, **options)  # type: ignore[arg-type]
        optimizer = AdamW(model.parameters(), **options, weight_decay=0, fused=True)  # type: ignore[arg-type]
        if kind == "AdamW, then projection":
            keep_on_hypersphere(model, optimizer)
        return optimizer

    optimizers = {kind: build(kind) for kind in ("AdamW", "AdamW, then projection", "SphereAdamW")}
    num_parameters = sum(p.numel() for group in optimizers["AdamW"].param_groups for p in group["params"])
    source = torch.zeros(num_parameters, device=device)
    target = torch.empty_like(source)
    candidates = {kind: harness.milliseconds(o.step) for kind, o in optimizers.items()}
    candidates["copy of the parameters"] = harness.milliseconds(lambda: target.copy_(source))
    for run in candidates.values():
        for _ in range(3):
            run()
    values = harness.interleave(candidates, args.rounds)
    results, rows = {}, []
    # reads of w, g, m, v and writes of w, m, v; the projection reads w, reads it again and writes it
    moved = {"AdamW": 28, "AdamW, then projection": 40, "SphereAdamW": 28, "copy of the parameters": 8}
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
