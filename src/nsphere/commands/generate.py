"""`nsphere generate`."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from nsphere.commands.flags import parse
from nsphere.generate import Sampling, generate_texts
from nsphere.kv_cache import cache_dtype
from nsphere.table import printable
from nsphere.train.machine import choose_device
from nsphere.train.saved import load_run


@dataclass(frozen=True)
class Generate:
    """Continue a prompt, or several side by side, with a trained model."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, or one of its checkpoints."""
    prompt: tuple[str, ...] = ("def ",)
    """What to continue. One is shown as it is made, several when all are done; prompt i has the seed SEED + i."""
    max_new_tokens: int = 400
    """How many tokens to make for each."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """Texts that end a continuation and are no part of it."""
    past_separator: bool = False
    """Go on where the model ends the document."""
    cache: str | None = None
    """Store keys and values in float32, bfloat16, float16, int8 or fp8; the run's own precision if not given."""
    compile: bool = False
    """Compile first, which takes a while and then makes each token quicker."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto."""


def main(argv: list[str]) -> None:
    args = parse(Generate, "generate", argv)
    if args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {args.max_new_tokens}")
    dtype = None if args.cache is None else cache_dtype(args.cache)
    device = choose_device(args.device)
    if args.compile:
        from nsphere.ops.backend import can_compile

        if not (ability := can_compile(device.type)).available:
            raise ValueError(f"--compile: {ability.reason}; leave it out")
    run = load_run(args.run, device)
    if run.tokenizer is None:
        raise ValueError(
            f"{args.run} has no tokenizer, being trained on tokens or imported without, so text can't be made "
            "from it; nsphere import takes --tokenizer"
        )
    texts = list(args.prompt)
    with run.autocast():
        pieces = generate_texts(
            run.folded(),
            run.tokenizer,
            args.prompt,
            args.max_new_tokens,
            args.sampling,
            stop=args.stop,
            stop_at_separator=not args.past_separator,
            cache_dtype=dtype,
            compile=args.compile,
        )
        if len(texts) == 1:
            sys.stdout.write(texts[0])
            for _, piece in pieces:
                sys.stdout.write(printable(piece))
                sys.stdout.flush()
            print()
            return
        for row, piece in pieces:
            texts[row] += piece
    for text in texts:
        print(f"{printable(text)}\n{'─' * 40}")
