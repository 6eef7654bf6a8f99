"""`nsphere compare`."""

from dataclasses import dataclass, field
from pathlib import Path

from nsphere.commands.flags import parse
from nsphere.compare import CompareConfig, compare
from nsphere.report.terminal import comparison_table
from nsphere.train.config import RunOptions, TrainConfig
from nsphere.train.data import DataConfig


@dataclass(frozen=True)
class Compare:
    """Train arms side by side on the same batches; print a table, write summary.json and report.html."""

    out: Path
    """Folder for the runs, summary.json and report.html."""
    what: CompareConfig = field(default_factory=CompareConfig)
    config: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    options: RunOptions = field(default_factory=RunOptions)
    resume: bool = False
    """Continue what is there; start it if nothing is."""


def main(argv: list[str]) -> None:
    args = parse(Compare, "compare", argv)
    summary = compare(args.what, args.config, args.options, args.data, args.out, resume=args.resume)
    if summary is not None:  # rank 0 tells what all did
        print(comparison_table(summary, args.out))
