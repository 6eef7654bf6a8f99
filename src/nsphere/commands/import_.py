"""`nsphere import`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nsphere.commands.flags import parse
from nsphere.import_model import import_model


@dataclass(frozen=True)
class Import:
    """Make a run folder of a model from elsewhere."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A .safetensors of nsphere export, a transformers folder (nGPT, GPT-2, Llama, Qwen3), a ckpt.pt of nanoGPT or
    NVIDIA/ngpt, or a saved state dict of PyPI's nGPT-pytorch."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder to make."""
    num_heads: int | None = None
    """Heads, where the source does not say."""
    context: int | None = None
    """Context, where the source does not say."""
    tokenizer: str | None = None
    """bytes, a tokenizer.json or its folder; the source's own if not given."""
    option: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What a model of nGPT-pytorch was built with, where it is not the default: add_value_residual=False; of
    nanoGPT gelu=tanh. Repeatable."""


def main(argv: list[str]) -> None:
    args = parse(Import, "import", argv)
    found = import_model(
        args.source,
        args.out,
        num_heads=args.num_heads,
        context=args.context,
        tokenizer=args.tokenizer,
        options=args.option,
    )
    print(f"{args.out}: {found.config['architecture']}, {found.model.num_parameters():,} parameters, step {found.step}")
    if found.tokenizer is None:
        print("no tokenizer, which texts need (generate, eval on texts): import it with --tokenizer to have one")
    elif (there := found.tokenizer.vocab_size) < (vocab_size := found.model.config.vocab_size):
        print(
            f"a tokenizer of {there} tokens for a model of {vocab_size}: right if the rest is padding, else import it "
            "with the --tokenizer that it was trained with"
        )
