"""The optimizers of a run, built from the model and the recipe."""

import torch
from torch.optim import Optimizer

from nsphere.layers import Decoder
from nsphere.optim import SphereAdamW, keep_on_hypersphere
from nsphere.train.config import TrainConfig
from nsphere.train.muon import ShardedMuon


def make_optimizers(model: Decoder, config: TrainConfig) -> list[Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest.

    Weight decay acts on matrices and embeddings only. Muon's update is scaled to the size of AdamW's
    (`match_rms_adamw`), so that one learning rate serves both. Sphere matrices are kept on the sphere.
    """
    assert config.lr is not None and config.weight_decay is not None
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizers: list[Optimizer] = []
    if config.optimizer == "muon":
        in_blocks = {id(p) for p in model.get_submodule("blocks").parameters()}
        hidden = [p for p in matrices if id(p) in in_blocks]
        matrices = [p for p in matrices if id(p) not in in_blocks]
        muon = ShardedMuon if any(hasattr(p, "device_mesh") for p in hidden) else torch.optim.Muon
        optimizers.append(
            muon(hidden, lr=config.lr, weight_decay=config.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        )
    groups: list[dict[str, object]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    lr, betas, eps = config.lr, (config.beta1, config.beta2), config.adam_eps
    if getattr(model.config, "projection", None) == "step":
        for optimizer in optimizers:
            keep_on_hypersphere(model, optimizer)
        return [*optimizers, SphereAdamW(model, groups, lr=lr, betas=betas, eps=eps)]
    return [*optimizers, torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)]
