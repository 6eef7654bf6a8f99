"""nGPT under transformers' Trainer."""

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from nsphere.optim import keep_on_hypersphere


class SphereCallback(TrainerCallback):
    """Keeps a model's matrices on the hypersphere: `Trainer(..., callbacks=[SphereCallback()])`.

    For `NGPTForCausalLM`, and for any model with matrices marked by `nsphere.on_sphere`. Set weight_decay to 0: what is
    normalised after every step has no length to decay.

    Raises (when training begins):
        ValueError: the optimizer holds no such matrix. LoRA trains none of them: leave the callback out there.
    """

    _handle: RemovableHandle | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Project what is off, and again after every step of the optimizer."""
        model: nn.Module = kwargs["model"]
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        self._handle = keep_on_hypersphere(model, optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the optimizer as it was."""
        if self._handle is not None:
            self._handle.remove()
