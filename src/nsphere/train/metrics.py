"""Where the numbers of a run go: metrics.jsonl, TensorBoard, wandb or trackio; and the model FLOPs utilisation."""

import importlib
import importlib.util
import math
import secrets
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from nsphere.layers import Decoder
from nsphere.train.files import JsonlWriter

METRICS_FILE = "metrics.jsonl"

PEAK_BF16_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 products with fp32 sums, per second, by what the GPU calls itself; NVIDIA's data sheets."""


def peak_flops(device: torch.device, in_bf16: bool) -> float | None:
    """The most that a device computes per second, None where that is not known: CPUs, products in fp32, other GPUs."""
    if device.type != "cuda" or not in_bf16:
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    known = sorted(PEAK_BF16_FLOPS, key=len, reverse=True)
    return next((PEAK_BF16_FLOPS[name] for name in known if set(name.split()) <= set(words)), None)


def flops_per_token(model: Decoder) -> int:
    """Additions and multiplications of forward and backward pass: 6 N + 12 L H D T (PaLM, appendix B).

    N leaves out the embeddings, which are looked up, unless that of tokens is the output head too. The attention matrix
    is counted whole, as is usual, although half of it is masked; what activation checkpointing repeats is not counted.
    """
    config = model.config
    looked_up = sum(p.numel() for p in model.embed.parameters())
    if getattr(config, "tied", False):
        looked_up -= config.vocab_size * config.d_model
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * config.context
    return 6 * (model.num_parameters() - looked_up) + attention


def attention_logit_bound(model: Decoder) -> float | None:
    """The largest |attention logit| that the q/k norms of this rank's heads allow; None where nothing bounds it."""
    bounds = [block.attn.qk_norm.logit_bound() for block in model.blocks]  # type: ignore[union-attr, operator]
    known = [bound for bound in bounds if bound is not None]
    return max(known) if len(known) == len(bounds) else None


def check_tracker(name: str | None) -> None:
    """Refuse a tracker that is not installed, before any work.

    Raises:
        ValueError: what to install.
    """
    if name is not None and importlib.util.find_spec(name) is None:
        raise ValueError(f"--track {name} needs the package {name}; pip install {name}")


class Metrics:
    """Writes the numbers of a run; on rank 0, on the others nothing.

    Args:
        out: the run folder.
        step: steps made before; what was written after that is dropped. None: the run starts, and all is.
        writes: whether this is rank 0.
        tensorboard: whether to write event files.
        track: "wandb", "trackio" or None.
        config: the run's, for the tracker.
    """

    def __init__(
        self, out: Path, step: int | None, *, writes: bool, tensorboard: bool, track: str | None, config: dict[str, Any]
    ) -> None:
        self._lines = self._events = self._tracker = None
        self._open = ExitStack()
        if not writes:
            return
        self._lines = self._open.enter_context(
            JsonlWriter(out / METRICS_FILE, resume_step=-1 if step is None else step)
        )
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(out / "tensorboard"), purge_step=0 if step is None else step + 1)
            self._open.callback(self._events.close)
        if track is not None:
            self._tracker = importlib.import_module(track)
            where = {"dir": str(out), "id": _identity(out)} if track == "wandb" else {}
            self._tracker.init(project="nsphere", name=out.name, config=config, resume="allow", **where)
            self._open.callback(self._tracker.finish)

    def write(self, step: int, kind: str, **numbers: Any) -> None:
        """A line, `kind` being train or eval; an event and a tracker's point for each number."""
        if self._lines is None:
            return
        # JSON knows no NaN: a skipped step's loss is null
        written = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}
        self._lines.write({"step": step, "kind": kind, **written})
        named = {f"{kind}/{name}": value for name, value in numbers.items()}
        if self._events is not None:
            for name, value in named.items():
                self._events.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.log(named, step=step)

    def sync(self) -> None:
        """Wait until all lines are on the disk. Before saving a checkpoint, so that none of its past is missing."""
        if self._lines is not None:
            self._lines.sync()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()


def _identity(out: Path) -> str:
    """The same for every start of a run folder, so that a resumed run goes on in the tracker too."""
    path = out / ".tracker-id"
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    return path.read_text()
