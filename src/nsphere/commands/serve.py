"""`nsphere serve`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nsphere.commands.flags import parse


@dataclass(frozen=True)
class Serve:
    """Answer OpenAI's clients from an exported transformers folder, with transformers' own server."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """What `nsphere export` has written."""
    host: str = "localhost"
    """Address to listen at."""
    port: int = 8000
    """Port to listen at."""


def main(argv: list[str]) -> None:
    args = parse(Serve, "serve", argv)
    from nsphere.hf.serve import serve  # after the flags: transformers takes seconds to import

    serve(args.folder, args.host, args.port)
