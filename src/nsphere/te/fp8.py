"""Transformer Engine's switches for FP8, which is not here: switched off they do nothing, switched on they say so."""

import contextlib
from typing import Any

_REASON = "nsphere.te has no FP8"


def autocast(
    enabled: bool = True,
    calibrating: bool = False,
    recipe: Any = None,
    amax_reduction_group: Any = None,
    _graph: bool = False,
) -> contextlib.AbstractContextManager[None]:
    """A context in which nothing happens, for scripts that can do without FP8.

    Args:
        enabled: False.
        calibrating: False.
        recipe: of FP8, not used.
        amax_reduction_group: as recipe.

    Raises:
        ValueError: if FP8, or calibrating for it, is asked for.
    """
    return _off("autocast", enabled or calibrating)


def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Any = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> contextlib.AbstractContextManager[None]:
    """The older name of `autocast`."""
    return _off("fp8_autocast", enabled or calibrating)


def quantized_model_init(
    enabled: bool = True, recipe: Any = None, preserve_high_precision_init_val: bool = False
) -> contextlib.AbstractContextManager[None]:
    """A context in which parameters are made as ever; ValueError if quantized ones are asked for."""
    return _off("quantized_model_init", enabled)


def fp8_model_init(
    enabled: bool = True, recipe: Any = None, preserve_high_precision_init_val: bool = False
) -> contextlib.AbstractContextManager[None]:
    """The older name of `quantized_model_init`."""
    return _off("fp8_model_init", enabled)


def is_fp8_available(return_reason: bool = False) -> bool | tuple[bool, str]:
    """False, with the reason if it is asked for."""
    return (False, _REASON) if return_reason else False


def _off(name: str, wanted: bool) -> contextlib.AbstractContextManager[None]:
    if wanted:
        raise ValueError(
            f"te.{name} was asked for FP8, and {_REASON}; give enabled=False (te.is_fp8_available() says what is to be "
            "had), and take torch.autocast for bf16"
        )
    return contextlib.nullcontext()
