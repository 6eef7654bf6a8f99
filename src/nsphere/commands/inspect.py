"""`nsphere inspect`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nsphere.commands.flags import parse
from nsphere.report import write_inspection
from nsphere.report.terminal import inspection_table
from nsphere.train.data import DataConfig, load_corpus, val_batches
from nsphere.train.inspection import inspect_model
from nsphere.train.machine import choose_device
from nsphere.train.run_folder import check_writable
from nsphere.train.saved import load_run
from nsphere.train.token_cache import data_cache


@dataclass(frozen=True)
class Inspect:
    """Condition numbers, attention logits, eigen learning rates and scales of a trained model."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, or one of its checkpoints."""
    out: Path | None = None
    """The page to write; inspection.html in the run folder if not given."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto."""


def main(argv: list[str]) -> None:
    args = parse(Inspect, "inspect", argv)
    device = choose_device(args.device)
    run = load_run(args.run, device)
    path = args.out if args.out is not None else run.folder / "inspection.html"
    if not path.parent.is_dir():
        raise ValueError(f"{path} can't be written: there is no folder {path.parent}; make it, or choose another --out")
    check_writable(path.parent)
    batch = None
    try:
        corpus = load_corpus(DataConfig(**run.config["data"]), cache_dir=data_cache())
        context = run.config["model"]["context"]
        batch = val_batches(corpus.val, context=context, batch_size=8, num_sequences=8)[0].to(device)
    except ValueError as error:
        print(f"no attention logits, because the run's data can't be read: {error}", file=sys.stderr)
    with run.autocast():
        inspection = inspect_model(run.model, batch)
    write_inspection(inspection, f"{run.config['arm']}, step {run.step}", path)
    print(inspection_table(inspection))
    print(f"\n{path}")
