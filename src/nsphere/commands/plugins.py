"""Code of the user's own that a command line names: `nsphere train --import my_norms.py ...`.

Only the command line is asked, never a config or a checkpoint: what a run needs and was not given is an error.
"""

import importlib
import importlib.util
import sys
from pathlib import Path


def import_plugin(name: str) -> None:
    """Import a Python file, or a module that is installed; once, however often it is asked for.

    Raises:
        ValueError: for what is not there, or fails while it is imported.
    """
    try:
        if name.endswith(".py"):
            _import_file(Path(name).resolve())
        else:
            importlib.import_module(name)
    except Exception as error:
        if isinstance(error, FileNotFoundError | ModuleNotFoundError) and _is_it(name, error):
            raise ValueError(f"--import {name}: not found; give a .py file, or a module that is installed") from None
        raise ValueError(f"--import {name} failed: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> None:
    # a name that no other module can have: the file may be called torch.py
    name = f"nsphere_import:{path}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _is_it(name: str, error: FileNotFoundError | ModuleNotFoundError) -> bool:
    """Whether what was not found is the thing itself, and nothing that it asks for."""
    if isinstance(error, ModuleNotFoundError):
        return error.name is not None and (name == error.name or name.startswith(error.name + "."))
    return error.filename == str(Path(name).resolve())
