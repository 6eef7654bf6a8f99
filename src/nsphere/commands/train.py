"""`nsphere train`."""

from dataclasses import dataclass, field
from pathlib import Path

from nsphere.commands.flags import parse
from nsphere.train.config import RunOptions, TrainConfig
from nsphere.train.data import DataConfig
from nsphere.train.loop import train


@dataclass(frozen=True)
class Train:
    """Train one arm into a run folder."""

    out: Path
    """The run folder."""
    arm: str = "ngpt"
    """What to train: gpt, gpt-qknorm, ngpt, ngpt:s_z_init=10, and so on; an unknown name lists all."""
    config: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    options: RunOptions = field(default_factory=RunOptions)
    resume: bool = False
    """Continue the run in the folder; start it if nothing is there."""


def main(argv: list[str]) -> None:
    args = parse(Train, "train", argv)
    train(args.arm, args.config, args.options, args.data, args.out, resume=args.resume)
