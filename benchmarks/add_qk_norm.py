"""A trained Llama gets QK-norm: what that costs at the start, and what it is worth at high learning rates.

A tiny Llama is trained on the source of Python's standard library at a learning rate that suits it. Copies of it, one
with QK-norm added and calibrated on four batches, one with weights of 1, one as it is, then go on for 200 steps at
each of several learning rates, on the same batches. Loss of every step, in nats per byte.

    python benchmarks/add_qk_norm.py --json benchmarks/results/add_qk_norm.json --picture docs/images/add-qk-norm.png
"""

import copy
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
import transformers
import tyro

from nsphere import hf
from nsphere.train.batches import Batches, val_batches
from nsphere.train.data import DataConfig, load_corpus

ARMS = {"Llama": None, "QK-norm, calibrated": True, "QK-norm, weights 1": False}


@dataclass(frozen=True)
class Args:
    """QK-norm added to a trained Llama."""

    lrs: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    """The learning rates to go on at."""
    seeds: int = 3
    """How many times all of it."""
    pretrain: int = 400
    """Steps before QK-norm is added, at lr 0.002."""
    steps: int = 200
    """Steps after."""
    warmup: int = 20
    """Of those, with the learning rate rising; Adam's averages start afresh."""
    width: int = 64
    """hidden_size; heads of 32 dims."""
    context: int = 64
    """Bytes in a sequence."""
    threads: int = 2
    """Threads of torch."""
    json: Path | None = None
    """Where to write the numbers."""
    picture: Path | None = None
    """Where to draw them."""


def make(args: Args, seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=args.width, num_hidden_layers=3, num_attention_heads=args.width // 32,
        num_key_value_heads=args.width // 32, intermediate_size=3 * args.width, vocab_size=256,
        max_position_embeddings=args.context, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def loss_of(model: Any, batch: Any) -> torch.Tensor:
    logits = model(input_ids=batch.inputs.long(), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.long().flatten())


def train(model: Any, batches: Batches, first: int, steps: int, lr: float, warmup: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / warmup)
        loss = loss_of(model, batches(first + step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
    return losses


@torch.no_grad()
def validate(model: Any, batches: list[Any]) -> float:
    model.eval()
    return statistics.fmean(loss_of(model, batch).item() for batch in batches)


def smoothed(losses: list[float], number: int) -> list[float]:
    """Means of so many losses in a row."""
    return [statistics.fmean(losses[i : i + number]) for i in range(len(losses) - number + 1)]


def largest_rise(losses: list[float]) -> float:
    """The largest rise above the lowest that came before."""
    return max(x - min(losses[: i + 1]) for i, x in enumerate(losses))


def one_seed(args: Args, seed: int, corpus: Any) -> dict[str, Any]:
    batches = Batches(corpus.train, context=args.context, batch_size=16, seed=seed)
    held_out = val_batches(corpus.val, context=args.context, batch_size=16, num_sequences=128)
    trained = make(args, seed)
    train(trained, batches, 0, args.pretrain, 0.002, 20)
    result: dict[str, Any] = {"start": {}, "runs": {}}
    for arm, calibrated in ARMS.items():
        model = copy.deepcopy(trained)
        if calibrated is not None:
            calibration = [{"input_ids": batches(args.pretrain + i).inputs.long()} for i in range(4)]
            hf.add_qk_norm(model, "rms", calibrate=calibration if calibrated else None)
        result["start"][arm] = validate(model, held_out)
        for lr in args.lrs:
            going_on = copy.deepcopy(model)
            losses = train(going_on, batches, args.pretrain, args.steps, lr, args.warmup)
            rise = largest_rise(smoothed(losses, 5))
            end = validate(going_on, held_out)
            result["runs"].setdefault(arm, {})[str(lr)] = {"losses": losses, "rise": rise, "end": end}
            print(
                f"seed {seed}  {arm:22s} lr {lr:<6g} start {result['start'][arm]:.3f}  rise {rise:.3f}  end {end:.3f}",
                flush=True,
            )
    return result


def panels(number: int) -> tuple[Any, Any]:
    """A figure with a panel for each learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(1, number, figsize=(3.2 * number, 3.0), sharey=True)


def plot_losses(axis: Any, losses: list[float], colour: str, label: str | None) -> list[float]:
    """Draw means of ten losses over the last step of each; returns them."""
    smooth = smoothed(losses, 10)
    axis.plot(range(10, len(losses) + 1), smooth, color=colour, lw=0.9, alpha=0.85, label=label)
    return smooth


def name_panel(axis: Any, title: str, xlabel: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(xlabel)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Any, num_seeds: int, ylim: tuple[float, float], path: Path) -> None:
    first = figure.axes[0]
    first.set_ylim(*ylim)
    first.set_ylabel(f"training loss, nats per byte\n(mean of 10 steps; {num_seeds} seeds)")
    first.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


def draw(results: list[dict[str, Any]], args: Args, path: Path) -> None:
    figure, axes = panels(len(args.lrs))
    colours = dict(zip(ARMS, ("#b3432b", "#1f5fa8", "#7fa8d6"), strict=True))
    for axis, lr in zip(axes, args.lrs, strict=True):
        for arm in ARMS:
            for i, result in enumerate(results):
                losses = result["runs"][arm][str(lr)]["losses"]
                plot_losses(axis, losses, colours[arm], arm if i == 0 else None)
        name_panel(axis, f"learning rate {lr:g}", "steps after QK-norm was added")
    save(figure, len(results), (1.5, 3.2), path)


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    corpus = load_corpus(DataConfig())
    results = [one_seed(args, seed, corpus) for seed in range(args.seeds)]

    def median(values: list[float]) -> str:
        return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    rows = []
    for lr in args.lrs:
        for arm in ARMS:
            runs = [r["runs"][arm][str(lr)] for r in results]
            rows.append(
                [f"{lr:g}", arm, median([r["start"][arm] for r in results])]
                + [median([run[key] for run in runs]) for key in ("rise", "end")]
            )
    header = ["lr", "arm", "start: val loss", "largest rise", "end: val loss"]
    harness.finish(
        "QK-norm added to a trained Llama",
        header,
        rows,
        {"args": vars(args) | {"json": None, "picture": None}, "seeds": results},
        args.json,
    )
    if args.picture is not None:
        draw(results, args, args.picture)


if __name__ == "__main__":
    main(tyro.cli(Args))
