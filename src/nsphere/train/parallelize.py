"""A model spread over the ranks of a job: tensor parallelism, activation checkpointing, compiling, FSDP, in that order.

Tensor parallelism splits heads and hidden units; the residual stream between them is split along the sequence, so
that norms, residual updates and their activations are divided too. W_q, W_k, W_v, W_u, W_ν and the embedding and head
are split by rows, W_o and W_down by columns, each scale with its rows. FSDP then splits every matrix again among the
ranks that work on different data. Vectors (scales, norm weights) are whole on all ranks of that kind and stay fp32:
together they are a thousandth of the model, and their gradients travel in one message a step.
"""

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from nsphere.collectives import Group, gather_sequence, local, scatter_sum, sum_gradient
from nsphere.hypersphere import Scale, sphere_matrices
from nsphere.layers import Attention, Decoder, DecoderConfig, SwiGLU
from nsphere.ngpt import QKScale
from nsphere.ops.linear_cross_entropy import VocabShard
from nsphere.tensor_parallel import check_heads, kv_rows, parallelize_qk_norm, split
from nsphere.train.config import TrainConfig
from nsphere.train.distributed import World


def check_layout(model: DecoderConfig, world: World, recipe: TrainConfig, micro_batch_size: int) -> None:
    """Refuse what the ranks can't share evenly.

    Args:
        model: the shape.
        world: the ranks.
        recipe: resolved.
        micro_batch_size: sequences of a forward pass of a rank.

    Raises:
        ValueError: what does not divide, and what to change.
    """
    tp, dp, batch_size = world.tp, world.dp, recipe.batch_size
    assert batch_size is not None
    if batch_size % (dp * micro_batch_size):
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of {dp} data-parallel ranks x micro_batch_size "
            f"{micro_batch_size}; change --batch-size or --micro-batch-size"
        )
    if tp == 1:
        return
    if recipe.optimizer == "muon":
        raise ValueError(
            f"muon orthogonalises whole matrices, and tensor parallelism splits them, here tp {tp}; take tp 1, or adamw"
        )
    if recipe.qk_clip is not None:
        raise ValueError(f"qk_clip is not made for tensor parallelism, here tp {tp}; take tp 1, or leave it out")
    if not model.has_rope:
        raise ValueError(
            f"tensor parallelism is not made for learned positions and biases (convention nanogpt), here tp {tp}; take "
            "tp 1, dp_shard splits such a model"
        )
    check_heads(model.num_heads, model.num_kv_heads, tp)
    for name in ("d_mlp", "vocab_size", "context"):
        if getattr(model, name) % tp:
            advice = "pad the vocabulary, or choose another tp" if name == "vocab_size" else "choose another tp"
            raise ValueError(f"{name} {getattr(model, name)} is not divisible by tp {tp}; {advice}")


def parallelize(model: Decoder, world: World, autocast_dtype: torch.dtype | None, compile: bool) -> None:
    """Spread a model that every rank built alike over the ranks, in place, and compile its parts if asked.

    Args:
        model: on any device, its matrices perhaps without memory (on meta).
        world: with a layout that `check_layout` allows.
        autocast_dtype: what products are computed in; matrices are gathered in it. None is fp32.
        compile: whether to compile each block and the loss.
    """
    if world.tp > 1:
        assert world.mesh is not None
        apply_tensor_parallel(model, world.mesh["tp"])
    columns = {id(m.weight) for m in sphere_matrices(model) if m.dim == 0}
    if world.layout.activation_checkpointing:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = checkpoint_wrapper(block, preserve_rng_state=False)  # nothing in it is random
    if compile:
        model.compile_parts()
    if world.dp > 1:
        apply_fsdp(model, world, autocast_dtype, columns)


def _is_tied(model: Decoder) -> bool:
    return getattr(model.config, "tied", False)


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Split the model among the ranks of a mesh of one axis, its residual stream along the sequence."""
    group, ranks = mesh.get_group(), mesh.size()
    vocab_size = model.config.vocab_size
    first = mesh.get_local_rank() * (vocab_size // ranks)
    _split_rows(model.embed, mesh)
    model.embed.__class__ = type("SplitEmbedding", (_OwnWords, type(model.embed)), {})
    model.embed.words = VocabShard(first, group)  # type: ignore[assignment]
    if not _is_tied(model):  # a tied head computes with the embedding's rows
        _split_rows(model.get_submodule("head"), mesh)
    model.vocab_shard = VocabShard(first, group)
    for block in model.blocks:
        for module in block.modules():
            if isinstance(module, Attention):
                _split_attention(module, model.config, mesh)
            elif isinstance(module, SwiGLU):
                for W in (module.W_u, module.W_nu):
                    _split_rows(W, mesh)
                split(module.W_down, mesh, {"weight": 1})
            else:
                continue
            module.register_forward_pre_hook(lambda _, args: (_gathered(args[0], group), *args[1:]))
            module.register_forward_hook(lambda _, args, out: scatter_sum(out, group))
    # the loss sees every token with this rank's words
    model.final_norm.register_forward_hook(lambda _, args, out: _gathered(out, group))
    for module in list(model.modules()):  # what is left is held whole: α, norm weights of the residual stream
        if any(not hasattr(p, "device_mesh") for p in module.parameters(recurse=False)):
            split(module, mesh, {})


def _split_rows(W: nn.Module, mesh: DeviceMesh) -> None:
    split(W, mesh, {"weight": 0})
    if isinstance(scale := getattr(W, "scale", None), Scale):
        _split_scale(scale, mesh)


def _split_scale(scale: Scale, mesh: DeviceMesh) -> None:
    split(scale, mesh, {"stored": 0} if scale.kind == "vector" else {})


def _split_attention(attention: Attention, config: DecoderConfig, mesh: DeviceMesh) -> None:
    _split_rows(attention.W_q, mesh)
    group = mesh.get_group()
    if config.num_kv_heads % mesh.size() == 0:
        _split_rows(attention.W_k, mesh)
        _split_rows(attention.W_v, mesh)
    else:  # fewer key heads than ranks: each rank holds all, uses one, and its queries give part of the gradient
        rows = kv_rows(config.num_kv_heads, config.head_dim, mesh)
        for W in (attention.W_k, attention.W_v):
            split(W, mesh, {}, lambda weight: sum_gradient(weight, group)[rows])
    split(attention.W_o, mesh, {"weight": 1})
    multiplier = attention.qk_norm.multiplier
    if isinstance(multiplier, QKScale):
        _split_scale(multiplier.s_qk, mesh)
        multiplier.num_heads //= mesh.size()
    parallelize_qk_norm(attention.qk_norm, mesh)


def _gathered(x: Tensor, group: Group) -> Tensor:
    # products run in autocast's dtype: casting first halves what is sent and changes no number
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return gather_sequence(x, group)


class _OwnWords(nn.Module):
    """An embedding that looks up the words it holds; the sum over the ranks has the row of every token once."""

    weight: Tensor
    words: VocabShard

    def forward(self, tokens: Tensor) -> Tensor:
        index = tokens - self.words.first
        here = (index >= 0) & (index < self.weight.shape[0])
        rows = super().forward(torch.where(here, index, 0))
        return scatter_sum(torch.where(here.unsqueeze(-1), rows, 0.0), self.words.group)


def apply_fsdp(model: Decoder, world: World, autocast_dtype: torch.dtype | None, columns: set[int]) -> None:
    """Split every matrix among the ranks that work on different data; see FSDP2.

    Masters, their gradients' reduction and the optimizer are fp32. Matrices of products are gathered in autocast's
    dtype, which rounds what autocast would have rounded; the embedding, which autocast leaves alone, in fp32.

    Args:
        model: on any device.
        world: with more than one data-parallel rank.
        autocast_dtype: of products; None is fp32.
        columns: ids of the matrices whose columns are unit vectors: where they divide evenly they are split by
            columns, so that the projection needs no communication.
    """
    assert world.mesh is not None
    mesh = world.mesh["dp_replicate", "dp_shard"] if world.layout.dp_replicate > 1 else world.mesh["dp_shard"]
    shards = world.layout.dp_shard or 1

    def placement(p: nn.Parameter) -> Shard | None:
        return Shard(1) if id(p) in columns and local(p).shape[1] % shards == 0 else None

    def shard(module: nn.Module, dtype: torch.dtype | None) -> None:
        policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=placement, ignored_params=vectors)

    vectors = {p for p in model.parameters() if p.dim() < 2}
    for block in model.blocks:
        shard(block, autocast_dtype)
    tied = _is_tied(model)
    if not tied:
        shard(model.embed, None)
        if getattr(model.config, "projection", "step") == "step":  # a look-up's gradient needs no weights
            model.embed.set_unshard_in_backward(False)  # type: ignore[operator]
    shard(model, None if tied else autocast_dtype)
    register_fsdp_forward_method(model, "loss")


def reshard(model: Decoder) -> None:
    """Split the output head again, which FSDP keeps whole after a forward pass without a backward one."""
    if isinstance(model, FSDPModule):
        model.reshard()
