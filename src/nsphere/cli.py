"""The `nsphere` command: which subcommand, and what its errors mean to whoever typed it."""

import importlib
import importlib.util
import io
import os
import sys
import time
from types import ModuleType
from typing import NoReturn

from nsphere import __version__

COMMANDS = {
    "compare": "train GPT, GPT + QK-norm and nGPT side by side, and report what each needed",
    "train": "train one of them",
    "generate": "continue a prompt with a trained model",
    "inspect": "pictures of the inside of a trained model",
    "eval": "loss, perplexity and bits per byte of a trained model, by context length",
    "import": "a model from elsewhere, as a run folder",
    "export": "a trained model for transformers, ONNX and others",
    "serve": "an exported folder over HTTP, as OpenAI's API has it",
    "families": "the published QK-norm variants, as a table",
    "bench": "what a step, the optimizer, memory and generation cost here, and what other nGPTs do",
    "info": "what this machine can do, and why not",
}

NEEDED = {
    **dict.fromkeys(("numpy", "tyro", "rich", "matplotlib", "tensorboard", "tokenizers", "safetensors"), "train"),
    **dict.fromkeys(("transformers", "datasets"), "hf"),
}
"""Packages beyond torch, and the extra that brings them."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit code. Bad input is one line on stderr and 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage() + _what_is_missing(), end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"nsphere {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        from nsphere.train.arms import nearest

        return _complain(f"unknown command {name!r}; {nearest(name, COMMANDS)}", 2)
    return _run(name, rest)


def command(name: str) -> ModuleType:
    """The module of a command, imported when it is asked for: no command pays for what another needs."""
    return importlib.import_module(f"nsphere.commands.{'import_' if name == 'import' else name}")


def _usage() -> str:
    commands = "".join(f"  {name:10} {about}\n" for name, about in COMMANDS.items())
    return f"""\
usage: nsphere COMMAND [flags]      (nsphere COMMAND --help tells the flags)

{commands}
Every command takes --import FILE.py (or an installed module): code of yours, such as a norm, to have by name.
"""


def _what_is_missing() -> str:
    """A line for whoever installed the library alone: no command but this help runs then."""
    missing = [name for name, extra in NEEDED.items() if extra == "train" and not importlib.util.find_spec(name)]
    return f"Not installed: {', '.join(missing)}; pip install 'nsphere[train]'\n" if missing else ""


def _run(name: str, rest: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):  # a sample or a dash must not end a run on a terminal of few letters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        command(name).main(rest)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        return _complain(f"nsphere {name}: interrupted", 130)
    except Exception as error:
        if os.environ.get("NSPHERE_DEBUG"):
            raise
        known = explain(error)
        if known is None:
            raise
        return _complain(f"nsphere {name}: {known[0]}", known[1])
    return 0


def explain(error: Exception) -> tuple[str, int] | None:
    """The line and the exit code for an error that is the user's, or the machine's; None for one that is ours."""
    if isinstance(error, ValueError):
        return str(error), 2
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in NEEDED:
        extra = NEEDED[error.name.partition(".")[0]]  # type: ignore[union-attr]
        return f"the package {error.name} is not installed; pip install 'nsphere[{extra}]'", 2
    if isinstance(error, OSError):
        return str(error), 1
    import torch

    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error):
        return f"out of memory; give a smaller --micro-batch-size ({error})", 1
    from nsphere.train.ranks import LostRank
    from nsphere.train.signals import Interrupted
    from nsphere.train.trainer import NonFinite

    if isinstance(error, Interrupted | LostRank):
        return str(error), error.exit_code
    return (str(error), 1) if isinstance(error, NonFinite) else None


def _complain(message: str, code: int) -> int:
    if rank := int(os.environ.get("RANK", "0")):
        # what is wrong on all ranks is said once, by rank 0, whose end lets torchrun end the others; a busy machine
        # may take seconds for that, but a job that was told to stop must not linger
        time.sleep(30 if code == 2 else 5)
        message = f"rank {rank}: {message}"
    print(" ".join(message.split()), file=sys.stderr)
    return code


def entry() -> NoReturn:
    """The console script: a closed pipe (`nsphere families | head`) is not an error."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
