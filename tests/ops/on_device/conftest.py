"""The kernels where they run; without a GPU that is Triton's interpreter, if TRITON_INTERPRET=1."""

from interpreter import patch_once

patch_once()
