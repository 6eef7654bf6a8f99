"""What does a training step hold: its peak, and what one block keeps for its backward?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nsphere.bench import harness
from nsphere.bench.step import ARMS, SIZES, SizeName, make_trainers
from nsphere.train.config import DtypeName
from nsphere.train.timing import peak_memory
from nsphere.train.trainer import Trainer


@dataclass(frozen=True)
class Args:
    """Peak memory of a compiled step, and the activations and weights in the compute dtype that a block keeps."""

    size: SizeName = "d512"
    """As in `nsphere bench step`."""
    eager: bool = False
    """Without the compiler."""
    dtype: DtypeName = "auto"
    """As in `nsphere bench step`."""
    json: Path | None = None
    """Where to write the numbers."""


def kept_by_a_block(trainer: Trainer) -> dict[str, int]:
    """Bytes that the first block's forward keeps, parameters aside, by dtype and shape; shared storage once."""
    model = trainer.model
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[str, int]] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}", storage.nbytes()
        return t

    tokens = trainer.batches(0).to(trainer.device)[0]
    with trainer.autocast():
        h, rope = model.place(tokens, None, tokens.shape[1])
        h = h.detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.blocks[0](h, rope, None, None)
    sums: dict[str, int] = {}
    for name, size in kept.values():
        sums[name] = sums.get(name, 0) + size
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def main(args: Args) -> None:
    """Measure, print, write."""
    trainers = make_trainers(SIZES[args.size], ARMS, not args.eager, args.dtype)
    results: dict[str, dict[str, Any]] = {}
    for arm, trainer in trainers.items():
        trainer.step()  # compiles, and makes the optimizer's state
        results[arm] = {
            "dtype": trainer.dtype_name,
            "peak_memory_bytes": peak_memory(trainer),
            "kept_by_a_block": kept_by_a_block(trainer),
        }
    rows = []
    for arm, found in results.items():
        peak, base = found["peak_memory_bytes"], results[ARMS[0]]["peak_memory_bytes"]
        rows.append(
            [
                arm,
                found["dtype"],
                "–" if peak is None else f"{peak / 2**20:,.0f}",
                "–" if peak is None or base is None else f"{peak / base:.3f}",
                f"{sum(found['kept_by_a_block'].values()) / 2**20:.1f}",
            ]
        )
    harness.finish(
        f"memory, {args.size}", ["arm", "dtype", "peak MiB", "over gpt", "a block keeps MiB"], rows, results, args.json
    )
