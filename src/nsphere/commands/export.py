"""`nsphere export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from nsphere.commands.flags import parse
from nsphere.export import export
from nsphere.train.saved import load_run


@dataclass(frozen=True)
class Export:
    """Write a trained model in the format of another tool."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, or one of its checkpoints."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The folder (hf) or file (.safetensors, .pt2, .onnx) to make."""
    to: Literal["hf", "safetensors", "torch-export", "onnx"] = "hf"
    """hf: a transformers folder; safetensors: one file; torch-export, onnx: a program from tokens to logits."""
    chat_template: Path | None = None
    """A Jinja file that makes a prompt of a conversation, to go along in the transformers folder."""


def main(argv: list[str]) -> None:
    args = parse(Export, "export", argv)
    for path in export(load_run(args.run, torch.device("cpu")), args.out, args.to, args.chat_template):
        print(path)
