"""Every reduction that the numbers depend on, left out one at a time."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

import nsphere.collectives as collectives


class Mutation(NamedTuple):
    """What takes the place of a function, and a run that must notice."""

    function: str
    instead: Callable[..., Any]
    layout: str
    arm: str
    shape: dict[str, Any] = {}  # noqa: RUF012
    only_in: str = "nsphere."
    """Modules whose name starts so are affected."""


def _own_positions(x: Tensor, group: Any) -> Tensor:
    return x.chunk(group.size(), 1)[group.rank()].contiguous()


def _except(average: bool) -> Callable[..., Any]:
    real = collectives.sum_gradients_
    return lambda gradients, group, average_=average, **kw: (
        None if kw.get("average", False) == average else real(gradients, group, **kw)
    )


def _own_parts() -> Callable[..., Any]:
    real = collectives.exchange

    def alone(sent: Any, shapes: Any, group: Any, like: Tensor) -> Any:
        return [
            [t if rank == group.rank() else torch.zeros_like(t) for t in came]
            for rank, came in enumerate(real(sent, shapes, group, like))
        ]

    return alone


FULL = "gpt-qknorm:qk_norm_over=full"
MUTATIONS = {
    "projection's sums of squares": Mutation("sum_squares_", lambda *_: None, "fsdp", "ngpt", {"d_mlp": 33}),
    "statistic of a full-width norm": Mutation("sum_statistic", lambda x, _: x, "tp", FULL),
    "gradient of that statistic": Mutation(
        "_SumStatistic.backward", staticmethod(lambda ctx, grad: (grad, None)), "tp", FULL
    ),
    "α's gradient over positions": Mutation("sum_gradients_", _except(False), "tp", "ngpt"),
    "gradient of norm weights that heads share": Mutation("sum_gradients_", _except(False), "tp", "gpt-qknorm"),
    "gradient of scales over data": Mutation("sum_gradients_", _except(True), "fsdp", "ngpt"),
    "gradient of key weights that ranks share": Mutation(
        "sum_gradient", lambda w, _: w, "tp", "gpt", {"num_kv_heads": 1}
    ),
    "sum of the blocks' outputs": Mutation("scatter_sum", _own_positions, "tp", "gpt"),
    "gradient of the gathered sequence": Mutation(
        "_GatherSequence.backward",
        staticmethod(lambda ctx, grad: (_own_positions(grad, ctx.group), None)),
        "tp",
        "gpt",
    ),
    "softmax's largest logit": Mutation("largest_logit", lambda x, _: x, "tp", "gpt"),
    "softmax's sum over words": Mutation("sum_over_words", lambda x, _: x, "tp", "gpt"),
    "matrices that Muon puts together": Mutation("exchange", _own_parts(), "fsdp", "gpt-muon"),
    "norm that gradients are clipped by": Mutation(
        "sum_totals", lambda x, group=None: x, "fsdp", "ngpt", {}, "nsphere.train.gradients"
    ),
    "loss": Mutation("sum_totals", lambda x, group=None: x, "fsdp", "gpt", {}, "nsphere.train.distributed"),
}


@contextmanager
def applied(mutation: Mutation) -> Iterator[None]:
    """The function replaced wherever it has been imported."""
    owner, _, method = mutation.function.partition(".")
    with ExitStack() as stack:
        if method:
            stack.enter_context(patch.object(getattr(collectives, owner), method, mutation.instead))
        else:
            real = getattr(collectives, owner)
            users = [m for name, m in list(sys.modules.items()) if name.startswith(mutation.only_in)]
            users = [m for m in users if getattr(m, owner, None) is real]
            assert users, f"nothing uses {owner}"
            for module in users:
                stack.enter_context(patch.object(module, owner, mutation.instead))
        yield
