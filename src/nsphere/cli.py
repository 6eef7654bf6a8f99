"""The `nsphere` command. Each subcommand imports what it needs when it runs."""

import contextlib
import dataclasses
import importlib.util
import io
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from nsphere import __version__

Args = TypeVar("Args")

NEEDED = {
    **dict.fromkeys(("numpy", "tyro", "rich", "matplotlib", "tensorboard", "tokenizers", "safetensors"), "train"),
    **dict.fromkeys(("transformers", "datasets"), "hf"),
}
"""Packages beyond torch, and the extra that brings them."""

USAGE = """\
usage: nsphere COMMAND [flags]      (nsphere COMMAND --help tells the flags)

  compare    train GPT, GPT + QK-norm and nGPT side by side, and report what each needed
  train      train one of them
  generate   continue a prompt with a trained model
  inspect    pictures of the inside of a trained model
  eval       loss, perplexity and bits per byte of a trained model, by context length
  import     a model from elsewhere, as a run folder
  export     a trained model for transformers, ONNX and others
  serve      an exported folder over HTTP, as OpenAI's API has it
  families   the published QK-norm variants, as a table
  bench      what a step, the optimizer, memory and generation cost here, and what other nGPTs do
  info       what this machine can do, and why not

Every command takes --import FILE.py (or an installed module): code of yours, such as a norm, to have by name.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit code. Bad input is one line on stderr and 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE + _what_is_missing(), end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"nsphere {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        from nsphere.train.arms import nearest

        return _complain(f"unknown command {name!r}; {nearest(name, COMMANDS)}", 2)
    return _run(name, rest)


def _what_is_missing() -> str:
    """A line for whoever installed the library alone: no command but this help runs then."""
    missing = [name for name, extra in NEEDED.items() if extra == "train" and not importlib.util.find_spec(name)]
    return f"Not installed: {', '.join(missing)}; pip install 'nsphere[train]'\n" if missing else ""


def _run(name: str, rest: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):  # a sample or a dash must not end a run on a terminal of few letters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        COMMANDS[name](rest)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        return _complain(f"nsphere {name}: interrupted", 130)
    except Exception as error:
        if os.environ.get("NSPHERE_DEBUG"):
            raise
        known = _explain(error)
        if known is None:
            raise
        return _complain(f"nsphere {name}: {known[0]}", known[1])
    return 0


def _explain(error: Exception) -> tuple[str, int] | None:
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


def _parse(kind: type[Args], name: str, argv: list[str]) -> Args:
    """The flags of a command as its dataclass; a mistake becomes a ValueError of one line.

    Every command takes --import beside its own, and has imported what it names when this returns.
    """
    import tyro

    from nsphere.plugins import import_plugin

    about = "A .py file, or an installed module, to import first: it may add norms with register_norm. Repeatable."
    flag = tyro.conf.arg(name="import", help=about, metavar="FILE.py|MODULE")
    plugins = Annotated[tuple[str, ...], flag, tyro.conf.UseAppendAction]
    with_import = dataclasses.make_dataclass(
        kind.__name__,
        [("plugins", plugins, field(default=()))],
        bases=(kind,),
        namespace={"__doc__": kind.__doc__},
        frozen=True,
        kw_only=True,
    )
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            args: Any = tyro.cli(
                with_import,
                args=argv,
                prog=f"nsphere {name}",
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(_one_line(complaint.getvalue(), name)) from None
    for plugin in args.plugins:
        import_plugin(plugin)
    return args


def _one_line(box: str, name: str) -> str:
    """What tyro says in a box, as a sentence, with where to find help."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [re.sub(r"^[│|]\s?|\s*[│|]$", "", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    if len(lines) > 1 and re.fullmatch("-+", lines[1]):
        del lines[0]  # the title, which stands above a rule where the terminal has no letters for a box
    kept = [line for line in lines if not re.match(r"[╭╰├+]|[─-]+$", line)]
    nearest = [line.split()[0] for line in lines if re.match(r"--\w", line)]
    text = " ".join(kept)
    # the group that a flag belongs to is of no concern to who typed it
    text = re.sub(r"Error parsing (what|config|data|options(\.layout)?|sampling): ", "", text)
    # the choices come in an order that changes from run to run, with the None of a flag that was not given
    text = re.sub(
        r"Expected one of \((.*?)\)",
        lambda m: "choose " + ", ".join(sorted(set(re.findall(r"'(.+?)'", m[1])) - {"None"})),
        text,
    )
    text = re.sub(r"Missing from nsphere [\w ]+: ", "missing: ", text)
    text = text.replace(" (required)", "")
    for python, plain in (
        ("invalid literal for int.. with base 10", "whole number"),
        ("could not convert string to float", "number"),
    ):
        text = re.sub(rf"Error parsing (--[\w-]+): {python}: ", rf"\1 takes a {plain}, got ", text)
    said = re.split(r"Perhaps you meant:|Argument helptext:|\.? Got errors:|For full helptext", text)[0].strip(" .")
    if "Perhaps you meant" in text and nearest:
        said += f"; did you mean {' or '.join(nearest[:2])}?"
    return f"{said or 'bad flags'}; nsphere {name} --help tells the flags"


def _compare(argv: list[str]) -> None:
    from nsphere.compare import CompareConfig, RunOptions, TrainConfig, compare
    from nsphere.table import comparison_table
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

    args = _parse(Compare, "compare", argv)
    summary = compare(args.what, args.config, args.options, args.data, args.out, resume=args.resume)
    if summary is not None:  # rank 0 tells what all did
        print(comparison_table(summary, args.out))


def _train(argv: list[str]) -> None:
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

    args = _parse(Train, "train", argv)
    train(args.arm, args.config, args.options, args.data, args.out, resume=args.resume)


def _generate(argv: list[str]) -> None:
    import tyro

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

    args = _parse(Generate, "generate", argv)
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


def _inspect(argv: list[str]) -> None:
    import tyro

    from nsphere.report import write_inspection
    from nsphere.table import inspection_table
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

    args = _parse(Inspect, "inspect", argv)
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


def _eval(argv: list[str]) -> None:
    import tyro

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

    args = _parse(Eval, "eval", argv)
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


def _import(argv: list[str]) -> None:
    import tyro

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

    args = _parse(Import, "import", argv)
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


def _export(argv: list[str]) -> None:
    import torch
    import tyro

    from nsphere.export import export
    from nsphere.train.saved import load_run

    @dataclass(frozen=True)
    class Export:
        """Write a trained model in the format of another tool."""

        run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
        """A run folder, or one of its checkpoints."""
        out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
        """The folder (hf) or file (.safetensors, .pt2, .onnx) to make."""
        to: Literal["hf", "safetensors", "torch-export", "onnx"] = "hf"
        """hf: a transformers folder; safetensors: one file; torch-export, onnx: a program from tokens to logits."""
        chat_template: Path | None = None
        """A Jinja file that makes a prompt of a conversation, to go along in the transformers folder."""

    args = _parse(Export, "export", argv)
    for path in export(load_run(args.run, torch.device("cpu")), args.out, args.to, args.chat_template):
        print(path)


def _serve(argv: list[str]) -> None:
    import tyro

    @dataclass(frozen=True)
    class Serve:
        """Answer OpenAI's clients from an exported transformers folder, with transformers' own server."""

        folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
        """What `nsphere export` has written."""
        host: str = "localhost"
        """Address to listen at."""
        port: int = 8000
        """Port to listen at."""

    args = _parse(Serve, "serve", argv)
    from nsphere.hf.serve import serve

    serve(args.folder, args.host, args.port)


def _families(argv: list[str]) -> None:
    from nsphere.families import table

    @dataclass(frozen=True)
    class Families:
        """The published QK-norm variants that families.qk_norm knows, as a table."""

    _parse(Families, "families", argv)
    print(table())


def _info(argv: list[str]) -> None:
    from nsphere.table import info_table

    @dataclass(frozen=True)
    class Info:
        """What this machine can do: devices, dtypes, the compiler and the backends, and why not."""

    _parse(Info, "info", argv)
    print(info_table())


BENCHMARKS = {
    "step": "a training step of nGPT over GPT's, in parts",
    "optimizer": "AdamW, AdamW and the projection, SphereAdamW",
    "ops": "the fused operations over torch.compile and over a copy",
    "memory": "the peak of a step, and what a block keeps for its backward",
    "decode": "generation: reading a prompt, and a token after it",
    "peers": "nGPT steps of other packages, as far as they are installed",
}


def _bench(argv: list[str]) -> None:
    import importlib

    if not argv or argv[0] in ("-h", "--help"):
        print("usage: nsphere bench WHAT [flags]      (nsphere bench WHAT --help tells the flags)\n")
        print("\n".join(f"  {name:10} {about}" for name, about in BENCHMARKS.items()))
        if not argv:
            raise ValueError(f"say what to measure: {', '.join(BENCHMARKS)}")
        raise SystemExit(0)  # as the other commands' --help ends
    if argv[0] not in BENCHMARKS:
        from nsphere.train.arms import nearest

        raise ValueError(f"unknown benchmark {argv[0]!r}; {nearest(argv[0], BENCHMARKS)}")
    module = importlib.import_module(f"nsphere.bench.{argv[0]}")
    args = _parse(module.Args, f"bench {argv[0]}", argv[1:])
    for name, value in vars(args).items():
        if type(value) is int and value < 1:  # they all are numbers of something
            raise ValueError(f"{name} must be at least 1, got {value}")
    if args.json is not None:  # before minutes of measuring
        from nsphere.train.run_folder import check_writable

        if args.json.is_dir():
            raise ValueError(f"--json {args.json} is a folder; give a file to write the numbers to")
        check_writable(args.json.parent)
    module.main(args)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "compare": _compare,
    "train": _train,
    "generate": _generate,
    "inspect": _inspect,
    "eval": _eval,
    "import": _import,
    "export": _export,
    "serve": _serve,
    "families": _families,
    "bench": _bench,
    "info": _info,
}


def entry() -> NoReturn:
    """The console script: a closed pipe (`nsphere families | head`) is not an error."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
