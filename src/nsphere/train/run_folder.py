"""The folder that a run leaves, apart from what is in its files: names, what may be written where, how it ended.

RUN/config.json         what defines the numbers
    environment.json    versions and hardware, of every start
    tokenizer/          what turns text into tokens and back
    metrics.jsonl       a line per step and per evaluation
    tensorboard/        the same for TensorBoard
    checkpoints/        see checkpoint/__init__.py
    result.json         written at the end
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsphere.train.config import differences, read_config, shown

CONFIG_FILE, ENVIRONMENT_FILE, RESULT_FILE = "config.json", "environment.json", "result.json"
TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class Result:
    """How a run ended; result.json."""

    final_val_loss: float
    """Nats per token."""
    bits_per_byte: float | None
    """None where the data does not say how many bytes a token stands for."""
    steps: int
    tokens: int
    skipped_steps: int
    num_parameters: int
    train_seconds: float
    """Wall time of all steps, evaluations and checkpoints apart."""
    data_sha256: str


def check_writable(folder: Path) -> None:
    """Refuse a folder that can't be made or written, without making it.

    Raises:
        ValueError: with the reason.
    """
    try:
        existing = folder
        while not existing.exists():
            existing = existing.parent
    except OSError as error:
        raise ValueError(f"{folder} can't be written: {error.strerror}; choose another folder") from None
    if not existing.is_dir():
        raise ValueError(f"{folder} can't be written: {existing} is a file; choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} can't be written: no permission in {existing}; choose another folder")


def check_run_folder(out: Path, resume: bool) -> None:
    """Refuse to write over a run or a comparison; before the data is read.

    Raises:
        ValueError: it can't be written, or --resume is needed.
    """
    check_writable(out)
    if (out / "compare.json").exists():
        raise ValueError(f"{out} holds a comparison; choose another --out for the run")
    if (out / CONFIG_FILE).exists() and not resume:
        raise ValueError(f"run folder {out} exists; give --resume to continue it, or another --out")


def check_same(out: Path, there: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    """Refuse to continue a run or comparison as another one.

    Raises:
        ValueError: what differs.
    """
    different = differences(json.loads(json.dumps(wanted)), there)
    if different:
        raise ValueError(f"{out} holds another {what}: {shown(different)}. Choose another --out, or remove this one")


def read_result(out: Path) -> Result | None:
    """The result of a finished run, or None if it is not finished."""
    path = out / RESULT_FILE
    if not path.exists():
        return None
    try:
        return Result(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is broken; delete it and resume the run, which only evaluates again") from None


def earlier_result(out: Path, wanted: dict[str, Any]) -> Result | None:
    """The result of an earlier start, if it finished.

    Raises:
        ValueError: the folder holds another run, or a broken one.
    """
    if (out / CONFIG_FILE).exists():
        check_same(out, read_config(out), wanted, "run")
    return read_result(out)
