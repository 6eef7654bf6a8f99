"""A run on disk, read back: the model, its tokenizer and what is known of it."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nsphere.fold import fold
from nsphere.layers import Decoder
from nsphere.presets import make_config, make_model
from nsphere.train.checkpoint import load_checkpoint
from nsphere.train.config import read_config
from nsphere.train.run_folder import TOKENIZER_FOLDER
from nsphere.train.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class SavedRun:
    """A run folder's content."""

    folder: Path
    step: int
    config: dict[str, Any]
    model: Decoder
    tokenizer: Tokenizer | None

    @property
    def is_bf16(self) -> bool:
        """Whether the run was trained with products in bfloat16."""
        return self.config["train"].get("dtype") == "bfloat16"

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision that the run was trained in."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.is_bf16)

    def folded(self) -> Decoder:
        """The model made ready for inference, to be run under `autocast()`; see `nsphere.fold`."""
        return fold(self.model, torch.bfloat16 if self.is_bf16 else None)


def load_run(path: str | Path, device: torch.device) -> SavedRun:
    """The run of a folder, or of one of its checkpoints (RUN/checkpoints/step-…): newest sound weights, or those.

    Raises:
        ValueError: no run folder, a checkpoint that is broken, newer, or of another architecture, or a tokenizer of
            more tokens than the model has.
    """
    path = Path(path)
    folder = path.parent.parent if path.parent.name == "checkpoints" else path
    if (folder / "summary.json").exists() and (folder / "arms").is_dir():
        arms = ", ".join(sorted(str(p.parent) for p in folder.glob("arms/*/*/config.json")))
        raise ValueError(f"{folder} holds a comparison; give one of its runs: {arms}")
    config = read_config(folder)
    checkpoint = load_checkpoint(path, expect_architecture=config["architecture"])
    with torch.random.fork_rng(devices=[]):
        model = make_model(make_config(config["architecture"], **config["model"]))
    checkpoint.restore(model)
    kept = folder / TOKENIZER_FOLDER
    tokenizer = load_tokenizer(kept) if kept.is_dir() else None
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{folder} has a tokenizer of {tokenizer.vocab_size} tokens and a model of {model.config.vocab_size}: it "
            "is another model's; put the right one into its tokenizer folder"
        )
    return SavedRun(folder, checkpoint.step, config, model.to(device).eval(), tokenizer)
