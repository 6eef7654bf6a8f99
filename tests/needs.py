"""What a test needs and may not find."""

import pytest
import torch

from nsphere.ops.backend import cpp_compiler, why_not

compiler = pytest.mark.skipif(not cpp_compiler().available, reason=cpp_compiler().reason)
"""A C++ compiler, for torch.compile on the CPU."""

kernels = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        why_not("triton", "cuda" if torch.cuda.is_available() else "cpu") is not None,
        reason="the kernels run on a CUDA device (`make gpu`), or at tiny sizes with TRITON_INTERPRET=1",
    ),
]
"""A device that Triton kernels run on."""
