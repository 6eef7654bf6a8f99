"""QK-norm in a tiny Llama that Muon trains from its first step: at which learning rates does it train at all?

Muon moves every direction of a matrix alike, so the logits q·k, products of two matrices, grow faster than anything
else; Kimi K2's training met that with QK-clip. A tiny Llama as it is, and the same with QK-norm added (weights of 1),
train on the source of Python's standard library at each of several learning rates of Muon, on the same batches.
Embedding, head and norms get AdamW at 0.002 throughout. Loss of every step, in nats per byte, and the largest
attention logit at the end.

    python benchmarks/add_qk_norm_muon.py --json benchmarks/results/add_qk_norm_muon.json \
        --picture docs/images/add-qk-norm-muon.png

With --float16 attention the attention of transformers, eager, gets q, k and v in float16, so that q·k, before it is
scaled, is in float16, and the softmax, as there, in fp32; all else is fp32. With --float16 autocast every matrix
product is in float16, as torch's autocast has it. Weights are fp32, GradScaler scales the loss and skips steps whose
gradients are not finite.

    python benchmarks/add_qk_norm_muon.py --float16 attention --lrs 0.3 1 2 \
        --json benchmarks/results/add_qk_norm_float16.json --picture docs/images/add-qk-norm-float16.png
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import add_qk_norm as tiny
import harness
import torch
import tyro
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from nsphere import hf
from nsphere.train.batches import Batches, val_batches
from nsphere.train.data import DataConfig, load_corpus

ARMS = ("Llama", "with QK-norm")


@dataclass(frozen=True)
class Args:
    """QK-norm under Muon, from scratch."""

    lrs: tuple[float, ...] = (0.02, 0.1, 0.3, 1.0)
    """Of Muon."""
    seeds: int = 2
    """How many times all of it."""
    steps: int = 200
    """Steps, 20 of them warmup."""
    float16: Literal["attention", "autocast"] | None = None
    """What is in float16; by default nothing."""
    threads: int = 2
    """Threads of torch."""
    json: Path | None = None
    """Where to write the numbers."""
    picture: Path | None = None
    """Where to draw them."""


def in_precision(args: Args) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.float16, enabled=args.float16 == "autocast")


def attend_in_float16(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
    """Transformers' eager attention on q, k and v rounded to float16."""
    q, k, v = (x.half() for x in (q, k, v))
    mask = mask.clamp(min=torch.finfo(torch.float16).min).half()  # as of a model in float16
    y, weights = eager_attention_forward(module, q, k, v, mask, **kwargs)
    return y.to(module.o_proj.weight.dtype), weights


def train(args: Args, model: Any, batches: Batches, lr: float) -> list[float]:
    matrices = [p for name, p in model.named_parameters() if "_proj." in name]
    others = [p for name, p in model.named_parameters() if "_proj." not in name]
    optimizers = {
        lr: torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.0),
        0.002: torch.optim.AdamW(others, lr=0.002, betas=(0.9, 0.95), weight_decay=0.0),
    }
    scaler = torch.amp.GradScaler("cpu", enabled=args.float16 is not None)
    losses = []
    model.train()
    for step in range(args.steps):
        with in_precision(args):
            loss = tiny.loss_of(model, batches(step))
        scaler.scale(loss).backward()
        for optimizer in optimizers.values():
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for usual, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = usual * min(1.0, (step + 1) / 20)
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        losses.append(round(loss.item(), 4))
    return losses


def summary(losses: list[float]) -> dict[str, Any]:
    """The losses, None where one is not finite; the first such step, from 1; how many; the largest rise before it."""
    lost = [step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)]
    before = losses[: lost[0] - 1] if lost else losses
    return {
        "losses": [loss if math.isfinite(loss) else None for loss in losses],
        "rise": tiny.largest_rise(tiny.smoothed(before, 10)),
        "first_nan": lost[0] if lost else None,
        "nans": len(lost),
    }


def largest_logit(model: Any, batch: Any) -> float:
    """Of all heads and layers, as it enters the softmax."""
    hf.report_max_logits(model)
    attentions = [module for module in model.modules() if "max_logits" in module._buffers]
    for module in attentions:
        module.max_logits = torch.full((model.config.num_attention_heads,), -torch.inf)
    tiny.loss_of(model, batch)
    return max(module.max_logits.max().item() for module in attentions)


def one_seed(args: Args, seed: int, corpus: Any) -> dict[str, Any]:
    shape = tiny.Args()
    batches = Batches(corpus.train, context=shape.context, batch_size=16, seed=seed)
    held_out = val_batches(corpus.val, context=shape.context, batch_size=16, num_sequences=128)
    runs: dict[str, Any] = {}
    for lr in args.lrs:
        for arm in ARMS:
            model = tiny.make(shape, seed)
            if args.float16 is not None:
                model.set_attn_implementation("eager" if args.float16 == "autocast" else "eager_float16")
            if arm != "Llama":
                hf.add_qk_norm(model, "rms")
            losses = train(args, model, batches, lr)
            with in_precision(args):
                end = tiny.validate(model, held_out)
            run = summary(losses)
            run |= {
                "end": end if math.isfinite(end) else None,
                "logit": largest_logit(model, held_out[0]),
            }
            runs.setdefault(arm, {})[str(lr)] = run
            print(
                f"seed {seed}  lr {lr:<5g} {arm:13s} rise {run['rise']:.3f}  end {end:.3f}  logit {run['logit']:.0f}  "
                f"NaN {run['nans']} times, from step {run['first_nan']}",
                flush=True,
            )
    return runs


def draw(results: list[dict[str, Any]], args: Args, path: Path) -> None:
    figure, axes = tiny.panels(len(args.lrs))
    for axis, lr in zip(axes, args.lrs, strict=True):
        for arm, colour in zip(ARMS, ("#b3432b", "#1f5fa8"), strict=True):
            lost = []
            for i, runs in enumerate(results):
                nan = runs[arm][str(lr)]["first_nan"]
                losses = runs[arm][str(lr)]["losses"][: None if nan is None else nan - 1]
                smooth = tiny.plot_losses(axis, losses, colour, arm if i == 0 else None)
                if nan is not None:
                    axis.plot(len(losses), smooth[-1], "x", color=colour, ms=7, mew=1.8)
                    lost.append((nan, smooth[-1]))
            if lost:
                axis.annotate(
                    f"NaN from steps {', '.join(str(nan) for nan, _ in lost)}", max(lost), xytext=(10, 2),
                    textcoords="offset points", fontsize=8, color=colour,
                )  # fmt: skip
        tiny.name_panel(axis, f"Muon, learning rate {lr:g}", "steps")
    tiny.save(figure, len(results), (1.6, 4.0), path)


def main(args: Args) -> None:
    AttentionInterface.register("eager_float16", attend_in_float16)
    AttentionMaskInterface.register("eager_float16", eager_mask)
    torch.set_num_threads(args.threads)
    corpus = load_corpus(DataConfig())
    results = [one_seed(args, seed, corpus) for seed in range(args.seeds)]
    rows = []
    for lr in args.lrs:
        for arm in ARMS:
            runs = [r[arm][str(lr)] for r in results]
            rows.append([f"{lr:g}", arm])
            for key in ("rise", "end"):
                rows[-1].append(" ".join("NaN" if run[key] is None else f"{run[key]:.3f}" for run in runs))
            rows[-1].append(" ".join(f"{run['logit']:.0f}" for run in runs))
            rows[-1].append(
                ", ".join(f"{run['nans']} from step {run['first_nan']}" if run["nans"] else "0" for run in runs)
            )
    header = ["lr", "arm", "largest rise", "end: val loss", "largest logit", "losses of NaN"]
    harness.finish(
        "QK-norm under Muon, from scratch",
        header,
        rows,
        {"args": vars(args) | {"json": None, "picture": None}, "seeds": results},
        args.json,
    )
    if args.picture is not None:
        draw(results, args, args.picture)


if __name__ == "__main__":
    main(tyro.cli(Args))
