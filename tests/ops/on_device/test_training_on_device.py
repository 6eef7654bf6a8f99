"""A run's losses are the same under every backend, within rounding."""

import pytest
import tiny
import torch
from needs import kernels
from ops.on_device.device import ON_GPU, size

from nsphere.ops import backend as backends
from nsphere.train.config import resolve
from nsphere.train.data import load_corpus
from nsphere.train.job import process_settings
from nsphere.train.trainer import Trainer

pytestmark = kernels

STEPS = 50
SHAPE = size(
    {"d_model": 256, "num_layers": 2, "num_heads": 4, "context": 128, "batch_size": 8},
    {"d_model": 16, "num_layers": 1, "num_heads": 2, "context": 2, "batch_size": 1},
)


def losses(corpus, compiled):
    config = resolve("ngpt", tiny.config(**SHAPE, steps=STEPS))
    options = tiny.options(device="cuda" if ON_GPU else "cpu", compile=compiled)
    with process_settings(options, torch.device(options.device)):
        trainer = Trainer("ngpt", config, options, corpus)
        return torch.tensor([trainer.step().loss for _ in range(STEPS)], dtype=torch.float64)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_losses_are_the_same(tmp_path, monkeypatch):
    """fp32, so that a wrong formula can't hide in rounding.

    Losses differ by the last bits of fp32 at first (1e-7), and steps make more of it: 3e-7 of the loss in the 50 steps
    of the interpreter. A wrong formula is off by 1e-2 in a few steps.
    """
    corpus = load_corpus(tiny.text_file(tmp_path), cache_dir=None)
    runs = {}
    for name, compiled in (("reference", False), ("triton", False), ("compiled", True), ("triton", True)):
        if compiled and not (ON_GPU or name == "compiled"):
            continue  # the interpreter's kernels are the same in a compiled graph, see the ops' tests
        if backends.why_not(name, "cuda" if ON_GPU else "cpu") is not None:
            continue
        torch._dynamo.reset()
        monkeypatch.setenv("NSPHERE_BACKEND", name)
        runs[name, compiled] = losses(corpus, compiled)
    expected = runs.pop(("reference", False))
    assert runs and expected.std() > 0.1  # the runs learn something
    for key, found in runs.items():
        assert ((found - expected).abs() / expected).max() <= size(2e-5, 4e-6), (
            key,
            ((found - expected).abs() / expected).max(),
        )
