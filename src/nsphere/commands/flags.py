"""A command's flags, parsed into its dataclass; a mistake in them becomes one line."""

import contextlib
import dataclasses
import io
import re
from dataclasses import field
from typing import Annotated, Any, TypeVar

import tyro

from nsphere.commands.plugins import import_plugin

Args = TypeVar("Args")


def parse(kind: type[Args], name: str, argv: list[str]) -> Args:
    """The flags of a command as its dataclass; a mistake becomes a ValueError of one line.

    Every command takes --import beside its own, and has imported what it names when this returns.
    """
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
