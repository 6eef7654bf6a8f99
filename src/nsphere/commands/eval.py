"""`nsphere eval`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nsphere.commands.flags import parse
from nsphere.table import text_table
from nsphere.train.data import DataConfig, load_corpus
from nsphere.train.evaluation import loss_by_context, usual_contexts
from nsphere.train.files import atomic_write_json
from nsphere.train.machine import choose_device
from nsphere.train.run_folder import TOKENIZER_FOLDER
from nsphere.train.saved import load_run
from nsphere.train.token_cache import data_cache


@dataclass(frozen=True)
class Eval:
    """Loss, perplexity and bits per byte of a trained model on validation text, by context length."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, or one of its checkpoints."""
    data: str | None = None
    """Other data than the run's, as of nsphere train; its validation part is used, with the run's tokenizer."""
    contexts: tuple[int, ...] = ()
    """Lengths to evaluate at; if not given from a quarter of the trained context to four times it, where the model
    has such positions."""
    num_tokens: int | None = 262_144
    """How many tokens to predict at each length, about; None for all."""
    out: Path | None = None
    """A JSON file to write the numbers to."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto."""


def main(argv: list[str]) -> None:
    args = parse(Eval, "eval", argv)
    if args.num_tokens is not None and args.num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {args.num_tokens}")
    if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
        why = "it is a folder" if args.out.is_dir() else f"there is no folder {args.out.parent}"
        raise ValueError(f"{args.out} can't be written: {why}; choose another --out")
    run = load_run(args.run, choose_device(args.device))
    config = DataConfig(**run.config["data"])
    if args.data is not None:
        own = run.folder / TOKENIZER_FOLDER
        config = DataConfig(data=args.data, tokenizer=str(own) if own.is_dir() else config.tokenizer)
    corpus = load_corpus(config, cache_dir=data_cache())
    if corpus.vocab_size > run.model.config.vocab_size:
        raise ValueError(
            f"the data has a vocabulary of {corpus.vocab_size} and the model one of {run.model.config.vocab_size}; "
            "give data made by the model's own tokenizer"
        )
    contexts = args.contexts or usual_contexts(run.model, len(corpus.val))
    with run.autocast():
        found = loss_by_context(
            run.folded(),
            corpus.val,
            contexts,
            num_tokens=args.num_tokens,
            bytes_per_token=corpus.bytes_per_token,
        )
    trained = run.model.config.context
    rows = [
        [
            f"{f.context:,}{' (trained)' if f.context == trained else ''}",
            f"{f.num_tokens:,}",
            f"{f.loss:.4f}",
            f"{f.perplexity:,.3f}",
            "–" if f.bits_per_byte is None else f"{f.bits_per_byte:.4f}",
        ]
        for f in found
    ]
    print(text_table(["context", "tokens", "loss (nats)", "perplexity", "bits per byte"], rows))
    if args.out is not None:
        atomic_write_json(
            args.out, {"run": str(args.run), "step": run.step, "results": [dataclasses.asdict(f) for f in found]}
        )
