"""What a test needs and may not find."""

import pytest

from nsphere.ops.backend import cpp_compiler

compiler = pytest.mark.skipif(not cpp_compiler().available, reason=cpp_compiler().reason)
"""A C++ compiler, for torch.compile on the CPU."""
