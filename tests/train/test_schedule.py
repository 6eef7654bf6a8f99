import math

import pytest

from nsphere.train.schedule import lr_factor


def factors(name, warmup=0, decay=0.2, steps=100):
    return [lr_factor(name, step, steps, warmup, decay) for step in range(steps)]


def test_cosine_is_the_formula() -> None:
    assert factors("cosine") == pytest.approx([0.5 + 0.5 * math.cos(math.pi * s / 100) for s in range(100)])


def test_linear_falls_evenly_to_zero() -> None:
    assert factors("linear") == pytest.approx([1 - s / 100 for s in range(100)])


def test_wsd_is_constant_then_linear() -> None:
    f = factors("wsd")
    assert f[:81] == [1.0] * 81
    assert f[81:] == pytest.approx([(100 - s) / 20 for s in range(81, 100)])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_warmup_rises_linearly_and_meets_the_peak(name) -> None:
    f = factors(name, warmup=9)
    assert f[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert max(f) == 1.0
