"""What a layout needs of memory and of the network, on paper. `python -m nsphere.train.scaling` prints the tables.

The counts of collectives and bytes, and the bytes of state, are exact: tests hold them against small runs. Bytes are
those of the whole tensor that a collective is about; a ring sends (n − 1)/n of them per rank, twice for an all-reduce.
"""

from dataclasses import dataclass

from nsphere.gpt import GPTConfig
from nsphere.layers import DecoderConfig
from nsphere.ngpt import NGPTConfig
from nsphere.ops.linear_cross_entropy import MAX_LOGITS
from nsphere.train.distributed import Layout

FP32 = 4
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: of one block's matrices, the embedding (as of the head), and the vectors."""

    block: int
    embedding: int
    split_vectors: int
    """Scales that tensor parallelism splits with the rows they belong to."""
    whole_vectors: int
    """α and norm weights, which every rank has whole."""


def sizes(config: DecoderConfig) -> Sizes:
    """Of an untied GPT, or an nGPT with vector scales."""
    d, L, D = config.d_model, config.num_layers, config.head_dim
    q, kv = config.num_heads * D, config.num_kv_heads * D
    block = d * (2 * q + 2 * kv + 3 * config.d_mlp)
    if isinstance(config, NGPTConfig):
        return Sizes(block, config.vocab_size * d, L * (q + 2 * config.d_mlp) + config.vocab_size, 2 * d * L)
    assert isinstance(config, GPTConfig) and config.qk_norm == "none" and not config.tied
    return Sizes(block, config.vocab_size * d, 0, (2 * L + 1) * d)


def state_bytes(config: DecoderConfig, layout: Layout, muon: bool = False) -> int:
    """Of a rank: fp32 weights, gradients and Adam's two moments (Muon's one), where everything divides evenly."""
    s, shards = sizes(config), (layout.dp_shard or 1) * layout.tp
    matrices = config.num_layers * s.block + 2 * s.embedding
    adam = 4 * FP32 * (matrices // shards + s.split_vectors // layout.tp + s.whole_vectors)
    return adam - FP32 * config.num_layers * s.block // shards if muon else adam


def working_bytes(config: DecoderConfig, layout: Layout, rows: int) -> int:
    """What a bf16 step holds besides, about: with activation checkpointing, `rows` sequences at a time.

    Two blocks' weights as gathered and one block's gradients in bf16 and fp32; embedding and head; every block's
    input in fp32; one block's inside, recomputed; one chunk of logits with its gradient.
    """
    s, tp = sizes(config), layout.tp
    tokens = rows * config.context
    weights = (2 * 2 + 2 + FP32) * s.block // tp + (FP32 + 2 + FP32) * s.embedding // tp
    inputs = config.num_layers * tokens * config.d_model * FP32 // tp
    widths = config.num_heads * config.head_dim + config.num_kv_heads * config.head_dim
    inside = tokens * (2 * (4 * widths + 5 * config.d_mlp) + FP32 * 8 * config.d_model) // tp
    logits = 2 * FP32 * min(MAX_LOGITS, tokens * config.vocab_size // tp)
    return weights + inputs + inside + logits


def traffic(
    config: DecoderConfig,
    layout: Layout,
    *,
    rows: int,
    micro_batches: int = 1,
    bf16: bool = True,
    muon: bool = False,
) -> dict[str, tuple[int, int]]:
    """Collectives of a rank in one step: kind -> (calls, bytes).

    Args:
        config: the model.
        layout: resolved.
        rows: sequences of a micro-batch on a rank.
        micro_batches: how many of them a step accumulates.
        bf16: whether products are in bf16 (autocast), or all in fp32.
        muon: whether Muon trains the blocks' matrices, each orthogonalised on one rank of a shard group.
    """
    s, L, tp, shard = sizes(config), config.num_layers, layout.tp, layout.dp_shard or 1
    half = 2 if bf16 else FP32
    calls, sent = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)

    def add(kind: str, times: int, each: int) -> None:
        calls[kind] += times
        sent[kind] += times * each

    if shard > 1:
        # blocks in forward and backward; the head stays gathered between the two, and the embedding's gradient
        # needs no weights
        add("all_gather", 2 * L * micro_batches, s.block // tp * half)
        add("all_gather", micro_batches, s.embedding // tp * FP32)
        add("all_gather", micro_batches, s.embedding // tp * half)
        add("reduce_scatter", L * micro_batches, s.block // tp * FP32)
        add("reduce_scatter", 2 * micro_batches, s.embedding // tp * FP32)
        if muon:  # updates there and back, in bf16 whatever the rest is in
            add("all_to_all", 2, 2 * L * s.block)
    if layout.dp_replicate > 1:  # what is left of each block's gradient after the reduce-scatter
        add("all_reduce", L * micro_batches, s.block // (tp * shard) * FP32)
        add("all_reduce", 2 * micro_batches, s.embedding // (tp * shard) * FP32)
    if tp > 1:
        tokens = rows * config.context
        stream = tokens * config.d_model
        # into attention, MLP and head, out of attention and MLP; each comes back as the other in the backward pass
        for kind in ("all_gather", "reduce_scatter"):
            add(kind, (4 * L + 1) * micro_batches, stream * half)
            add(kind, micro_batches, stream * FP32)  # out of the embedding
        chunk = max(1, min(tokens, MAX_LOGITS // (config.vocab_size // tp)))
        chunks = -(-tokens // chunk)
        add("all_reduce", 2 * chunks * micro_batches, 0)
        sent["all_reduce"] += 3 * tokens * FP32 * micro_batches
        add("all_reduce", 1, s.whole_vectors * FP32)
    vectors = s.split_vectors // tp + s.whole_vectors
    for ranks in (layout.dp_replicate, shard):
        if ranks > 1:
            add("all_reduce", 1, vectors * FP32)
    if layout.dp_replicate * shard * tp > 1:
        add("all_reduce", 2, 8)  # the loss and the gradient norm
    return {kind: (calls[kind], sent[kind]) for kind in KINDS}


SHAPES = {
    "0.5B": NGPTConfig(vocab_size=32000, context=4096, d_model=1024, num_layers=24, num_heads=16),
    "1B": NGPTConfig(vocab_size=32000, context=4096, d_model=1280, num_layers=36, num_heads=20),
    "7B": NGPTConfig(vocab_size=32000, context=4096, d_model=4096, num_layers=32, num_heads=32, d_mlp=11008),
    "70B": NGPTConfig(
        vocab_size=32000, context=4096, d_model=8192, num_layers=80, num_heads=64, num_kv_heads=8, d_mlp=28672
    ),
}
LAYOUTS = {
    "0.5B": ((1, 8, 1), (8, 8, 1)),
    "1B": ((1, 8, 1), (16, 8, 1)),
    "7B": ((1, 8, 1), (1, 64, 1), (1, 32, 2), (32, 8, 1)),
    "70B": ((1, 64, 1), (1, 32, 8), (1, 128, 8), (4, 64, 4)),
}


def table() -> str:
    """Memory and traffic per rank of the shapes and layouts above, in Markdown."""
    lines = [
        "| model | GPUs | replicate × shard × tp | state GiB | working GiB | gather | reduce-scatter | all-reduce |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, shapes in LAYOUTS.items():
        for replicate, shard, tp in shapes:
            config, layout = SHAPES[name], Layout(replicate, shard, tp)
            sent = traffic(config, layout, rows=1)
            cells = [f"{sent[kind][0]}: {_in_units(sent[kind][1])}" for kind in KINDS[:3]]
            state, working = state_bytes(config, layout) / 2**30, working_bytes(config, layout, 1) / 2**30
            mesh = f"{replicate} × {shard} × {tp}"
            start = f"| {name} | {replicate * shard * tp} | {mesh} | {state:.1f} | {working:.1f}"
            lines.append(f"{start} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _in_units(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB" if num_bytes > 2**26 else f"{num_bytes / 2**20:.3g} MiB"


if __name__ == "__main__":
    print(table())
