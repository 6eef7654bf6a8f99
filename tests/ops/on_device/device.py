"""Where the kernels run here, and how large a test may be there."""

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# the interpreter has no compiled form to check and no code generator behind it
COMPILER = "inductor" if ON_GPU else "aot_eager"


def size(real, tiny):
    """What training uses, or in the interpreter something tiny."""
    return real if ON_GPU else tiny


def check(actual, truth, what):
    """Rounded once, from fp32: half a unit in the last place, and a few fp32 roundings of a sum.

    The interpreter cuts bf16 off where a GPU rounds: there a whole unit.
    """
    assert actual.shape == truth.shape and torch.isfinite(actual).all(), what
    eps = torch.finfo(actual.dtype).eps
    low = actual.dtype != torch.float32
    rtol = (eps / 2 if ON_GPU else eps) * 1.01 if low else 0.0
    largest = truth.abs().max().item()
    torch.testing.assert_close(
        actual.double(), truth, rtol=rtol, atol=4e-6 * largest, msg=lambda text: f"{what}: {text}"
    )
