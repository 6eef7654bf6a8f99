"""A trained model for other tools: a transformers folder, one safetensors file, a torch.export program, ONNX."""

import contextlib
import errno
import json
import logging
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nsphere.fold import fold
from nsphere.layers import Decoder
from nsphere.train.config import SCHEMA_VERSION
from nsphere.train.files import fsync_file, fsync_folder
from nsphere.train.model_state import live_tensors, tied_names
from nsphere.train.saved import SavedRun

SUFFIXES = {"hf": "", "safetensors": ".safetensors", "torch-export": ".pt2", "onnx": ".onnx"}
"""The formats, and how the name of what each writes must end; "hf" writes a folder."""

METADATA_KEY = "nsphere"
"""Where a safetensors file of ours says what its tensors are, as JSON."""

_ONE_FILE = 1 << 30  # protobuf, which ONNX is, ends at 2 GiB; larger weights go into a file beside


def export(run: SavedRun, out: Path, to: str, chat_template: Path | None = None) -> list[Path]:
    """Write a run's model in another format; whole or not at all.

    Args:
        run: from `load_run`.
        out: the folder or file to make; must not exist.
        to: "hf": a folder that transformers loads, see `nsphere.hf.export`. "safetensors": all parameters in one
            file under this library's names, which `nsphere import` reads. "torch-export": a program of torch.export,
            tokens int64 [B, T] → logits fp32 [B, T, V], for any B and any T up to the context. "onnx": the same as
            ONNX, with the input "tokens" and the output "logits". Both programs are folded (`nsphere.fold`), in fp32,
            and have no cache.
        chat_template: for "hf": a Jinja file that makes a prompt of a conversation, for chat completions.

    Returns:
        The files that were written.

    Raises:
        ValueError: an unknown format, a name that does not end as it should, something that is there already, a model
            that has no form there, or a chat template that can't be used.
    """
    if to not in SUFFIXES:
        raise ValueError(f"there is no export to {to!r}; choose {', '.join(SUFFIXES)}")
    if SUFFIXES[to] and out.suffix != SUFFIXES[to]:
        raise ValueError(f"{out} does not end in {SUFFIXES[to]}, as a file of --to {to} does; name it so")
    if os.path.exists(out):  # a name that is too long is said by new_folder
        raise ValueError(f"{out} is there already; remove it, or choose another name")
    if chat_template is not None and to != "hf":
        raise ValueError(f"a chat template belongs to a transformers folder, not to --to {to}; leave it out")
    if to == "hf":
        from nsphere.hf.export import write_folder

        with new_folder(out) as folder:
            write_folder(run, folder, chat_template=chat_template)
        return sorted(out.iterdir())
    write: Callable[[SavedRun, Path], None] = {
        "safetensors": _write_safetensors,
        "torch-export": _write_program,
        "onnx": _write_onnx,
    }[to]
    with new_folder(out.with_name(out.name + ".files")) as folder:
        write(run, folder / out.name)
    return _take_out(out)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that becomes it once all is written, and is removed if something fails."""
    if not os.path.isdir(out.parent):
        raise ValueError(f"{out} can't be written: there is no folder {out.parent}; make it, or choose another name")
    folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        folder.mkdir()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"{out} can't be written: its name is too long; choose a shorter one") from None
        raise
    try:
        yield folder
        for path in folder.rglob("*"):
            if path.is_file():
                fsync_file(path)
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    fsync_folder(out.parent)


def _take_out(out: Path) -> list[Path]:
    """Move what is in the folder `out`.files beside it, the file of that name last."""
    folder = out.with_name(out.name + ".files")
    made = []
    for path in sorted(folder.iterdir(), key=lambda path: path.name == out.name):
        made.append(out.with_name(path.name))
        os.replace(path, made[-1])
    folder.rmdir()
    return made


def _write_safetensors(run: SavedRun, path: Path) -> None:
    live = live_tensors(run.model)
    tied = tied_names(live)
    tensors = {name: t.detach().cpu().contiguous() for name, (_, t) in live.items() if name not in tied}
    about = {"schema_version": SCHEMA_VERSION, "step": run.step, "tied": tied, "config": run.config}
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(about), "format": "pt"})


class _Logits(nn.Module):
    """A model's forward pass with tokens as its only input."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)


def export_program(model: Decoder) -> torch.export.ExportedProgram:
    """The folded model as a program: tokens int64 [B, T] → logits [B, T, V], T up to the context."""
    context = model.config.context
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time", max=context)
    tokens = torch.zeros(2, min(3, context), dtype=torch.long, device=model.device)
    # without these attributes dims of 1 are taken for constants
    shapes: dict[str, Any] = {"tokens": {0: batch, 1: time}}
    return torch.export.export(_Logits(fold(model)), (tokens,), dynamic_shapes=shapes)


def _write_program(run: SavedRun, path: Path) -> None:
    torch.export.save(export_program(run.model), path)


def _write_onnx(run: SavedRun, path: Path) -> None:
    missing = [name for name in ("onnx", "onnxscript") if not _is_installed(name)]
    if missing:
        raise ValueError(f"--to onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    size = sum(p.numel() * p.element_size() for p in run.model.parameters())
    program = export_program(run.model)
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of operators of torchvision, which has no part in this
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # of torch's own code
            torch.onnx.export(
                program,
                (),
                path,
                input_names=["tokens"],
                output_names=["logits"],
                external_data=size > _ONE_FILE,
                verbose=False,
            )
    finally:
        log.setLevel(level)


def _is_installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None
