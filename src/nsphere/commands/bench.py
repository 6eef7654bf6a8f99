"""`nsphere bench`."""

import importlib

from nsphere.commands.flags import parse
from nsphere.train.arms import nearest
from nsphere.train.run_folder import check_writable

BENCHMARKS = {
    "step": "a training step of nGPT over GPT's, in parts",
    "optimizer": "AdamW, AdamW and the projection, SphereAdamW",
    "ops": "the fused operations over torch.compile and over a copy",
    "memory": "the peak of a step, and what a block keeps for its backward",
    "decode": "generation: reading a prompt, and a token after it",
    "peers": "nGPT steps of other packages, as far as they are installed",
}


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: nsphere bench WHAT [flags]      (nsphere bench WHAT --help tells the flags)\n")
        print("\n".join(f"  {name:10} {about}" for name, about in BENCHMARKS.items()))
        if not argv:
            raise ValueError(f"say what to measure: {', '.join(BENCHMARKS)}")
        raise SystemExit(0)  # as the other commands' --help ends
    if argv[0] not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {argv[0]!r}; {nearest(argv[0], BENCHMARKS)}")
    module = importlib.import_module(f"nsphere.bench.{argv[0]}")
    args = parse(module.Args, f"bench {argv[0]}", argv[1:])
    for name, value in vars(args).items():
        if type(value) is int and value < 1:  # they all are numbers of something
            raise ValueError(f"{name} must be at least 1, got {value}")
    if args.json is not None:  # before minutes of measuring
        if args.json.is_dir():
            raise ValueError(f"--json {args.json} is a folder; give a file to write the numbers to")
        check_writable(args.json.parent)
    module.main(args)
