"""C++ files of this package as libraries: compiled for this machine when first needed, kept for the next process."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from nsphere.ops.backend import cpp_command, cpp_compiler

# without contraction a product and a sum round twice, as they do in torch's kernels
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-ffp-contract=off")
_PLATFORM_FLAGS = () if sys.platform == "darwin" else ("-march=native", "-fopenmp")


@functools.cache
def load(source: Path) -> ctypes.CDLL:
    """The library of a C++ file that needs no header but the standard ones; under two seconds, the first time.

    Raises:
        RuntimeError: there is no compiler, or it cannot build the file.
    """
    ability = cpp_compiler()
    if not ability.available:
        raise RuntimeError(ability.reason)
    command = [*cpp_command(), *_FLAGS, *_PLATFORM_FLAGS]
    # code for this processor's instructions: a folder shared by several machines has one library for each
    key = hashlib.sha256("\0".join([*command, platform.node(), source.read_text()]).encode()).hexdigest()[:16]
    library = _folder() / f"{source.parent.name}-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            made = subprocess.run([*command, str(source), "-o", str(built)], capture_output=True, text=True)
            if made.returncode != 0:
                raise RuntimeError(f"{shlex.join(command)} can't build {source.name}: {made.stderr.strip()[-500:]}")
            os.replace(built, library)
    return ctypes.CDLL(str(library))


def _folder() -> Path:
    """Where torch.compile keeps what it builds."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir()) / "nsphere"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
