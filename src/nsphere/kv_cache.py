"""Keys and values of the tokens seen so far, as they are or in eight bits.

A slot of the cache is a position: the token at position p of a row is in slot p, whatever the other rows hold. So rows
of unequal length need no padding on the left, every row counts its positions from 0, and what a shorter row left in
slots beyond its end is overwritten before its mask lets it be seen.

Shapes: B rows, T new tokens, S slots that are looked at, K key and value heads, D head_dim.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

CacheDtype = torch.dtype | Literal["int8", "fp8"]

CACHE_NAMES = ("float32", "bfloat16", "float16", "int8", "fp8")
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
UNIT_GAIN = 256.0
"""What a component of a unit vector, at most 1, is multiplied by to use fp8's range without a scale of its own."""


def cache_dtype(name: str) -> CacheDtype:
    """The kind of cache of a name.

    Raises:
        ValueError: for an unknown one.
    """
    if name not in CACHE_NAMES:
        raise ValueError(f"a cache of {name!r} is not supported; choose {', '.join(CACHE_NAMES)}")
    return name if name in ("int8", "fp8") else getattr(torch, name)  # type: ignore[return-value]


class Vectors:
    """[B, S, K, D] of vectors.

    In int8 a vector is stored as round(127 x / s) with s = max |x|, in fp8 (e4m3) as 448 x / s, with s in bf16. Unit
    vectors in fp8 are stored as 256 x and need no s.

    Args:
        shape: [B, S, K, D].
        dtype: of what is stored.
        device: where.
        unit: whether the vectors have length 1.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: CacheDtype, device: torch.device, unit: bool) -> None:
        self.dtype, self.unit = dtype, unit
        if isinstance(dtype, torch.dtype):
            stored = dtype
        else:
            # fp8 is stored as the bytes it is: indexing does not know it on every device
            stored = torch.int8 if dtype == "int8" else torch.uint8
        self.codes = torch.zeros(shape, dtype=stored, device=device)
        scaled = dtype == "int8" or (dtype == "fp8" and not unit)
        self.scales = torch.zeros((*shape[:-1], 1), dtype=torch.bfloat16, device=device) if scaled else None

    def write(self, x: Tensor, rows: Tensor, positions: Tensor) -> None:
        """Store x [B, T, K, D] in slots `positions` [B, T] of rows [B, 1]."""
        scale = None
        if self.scales is not None:
            scale = x.abs().amax(-1, keepdim=True).to(torch.bfloat16)
            self.scales[rows, positions] = scale
        self.codes[rows, positions] = self._encode(x, scale)

    def read(self, end: int, dtype: torch.dtype) -> Tensor:
        """The first `end` slots [B, end, K, D]."""
        codes = self.codes[:, :end]
        if isinstance(self.dtype, torch.dtype):
            return codes.to(dtype)
        values = (codes if self.dtype == "int8" else codes.view(FP8)).float()
        if self.scales is None:
            return (values * (1 / UNIT_GAIN)).to(dtype)
        return (values * (self.scales[:, :end].float() * (1 / self._largest()))).to(dtype)

    def _largest(self) -> float:
        return 127.0 if self.dtype == "int8" else FP8_MAX

    def _encode(self, x: Tensor, scale: Tensor | None) -> Tensor:
        if isinstance(self.dtype, torch.dtype):
            return x.to(self.dtype)
        largest = self._largest()
        if scale is None:
            wide = x.float() * UNIT_GAIN
        else:  # a zero vector has scale 0 and stays zero; a scale may have been rounded down
            gain = torch.where(scale > 0, largest / scale.float(), 0.0)
            wide = (x.float() * gain).clamp(-largest, largest)
        return wide.round().to(torch.int8) if self.dtype == "int8" else wide.to(FP8).view(torch.uint8)

    def enlarge(self, num_slots: int) -> None:
        """Make room for more, keeping what is there."""
        self.codes = _longer(self.codes, num_slots)
        self.scales = None if self.scales is None else _longer(self.scales, num_slots)

    def row(self, index: int) -> "Vectors":
        """One row [1, S, K, D], in the same memory."""
        view = object.__new__(Vectors)
        view.dtype, view.unit = self.dtype, self.unit
        view.codes = self.codes[index : index + 1]
        view.scales = None if self.scales is None else self.scales[index : index + 1]
        return view

    def num_bytes(self) -> int:
        """Memory of what is stored."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales) if t is not None)


def _longer(x: Tensor, num_slots: int) -> Tensor:
    longer = x.new_zeros((x.shape[0], num_slots, *x.shape[2:]))
    longer[:, : x.shape[1]] = x
    return longer


class Slots(NamedTuple):
    """Where one layer's new keys and values go, and how many slots it looks at."""

    k: Vectors
    v: Vectors
    rows: Tensor
    positions: Tensor
    end: int

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new k and v [B, T, K, D]; all that is to be looked at, each [B, S, K, D] in k's dtype."""
        self.k.write(k, self.rows, self.positions)
        self.v.write(v, self.rows, self.positions)
        return self.k.read(self.end, k.dtype), self.v.read(self.end, v.dtype)


class KVCache:
    """The keys and values of a model, one slot for each position of each row.

    Args:
        num_layers: blocks.
        batch_size: B.
        max_tokens: most positions of a row.
        num_kv_heads: K.
        head_dim: D.
        dtype: of what is stored: a floating dtype, "int8" or "fp8".
        device: where.
        unit_keys: whether keys are unit vectors, as nGPT's are.
        grow: start small and double as needed; otherwise all memory is laid out at once and never moves.

    Raises:
        ValueError: for a dtype that keys and values can't be stored in.

    Attributes:
        end: the number of slots that are looked at; `reserve` sets it.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        max_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: CacheDtype,
        device: torch.device | str,
        *,
        unit_keys: bool = False,
        grow: bool = False,
    ) -> None:
        if isinstance(dtype, str):
            dtype = cache_dtype(dtype)
        elif not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f'a cache of {dtype} is not supported; give a floating dtype, "int8" or "fp8"')
        self.max_tokens, self.grow, self.end = max_tokens, grow, 0
        shape = (batch_size, min(max_tokens, 64) if grow else max_tokens, num_kv_heads, head_dim)
        device = torch.device(device)
        self.layers = [
            (Vectors(shape, dtype, device, unit_keys), Vectors(shape, dtype, device, False)) for _ in range(num_layers)
        ]
        self.rows = torch.arange(batch_size, device=device).unsqueeze(-1)

    def reserve(self, end: int) -> None:
        """Look at the first `end` slots from now on.

        Raises:
            ValueError: for more than max_tokens.
        """
        if end > self.max_tokens:
            raise ValueError(f"the cache holds {self.max_tokens} tokens, {end} were asked for; make it larger")
        capacity = self.layers[0][0].codes.shape[1]
        if end > capacity:
            for vectors in (v for layer in self.layers for v in layer):
                vectors.enlarge(min(self.max_tokens, max(end, 2 * capacity)))
        self.end = end

    def layer(self, index: int, positions: Tensor) -> Slots:
        """Where layer `index` stores the tokens at `positions` [B, T]."""
        k, v = self.layers[index]
        return Slots(k, v, self.rows, positions, self.end)

    def mask(self, positions: Tensor) -> Tensor:
        """Bool [B, 1, T, S], true where a token may look: at slots up to its own."""
        slots = torch.arange(self.end, device=positions.device)
        return (slots <= positions.unsqueeze(-1)).unsqueeze(1)

    def row(self, index: int) -> "KVCache":
        """The cache of one row, in the same memory, with an `end` of its own."""
        view = object.__new__(KVCache)
        view.max_tokens, view.grow, view.end = self.layers[0][0].codes.shape[1], False, 0
        view.layers = [(k.row(index), v.row(index)) for k, v in self.layers]
        view.rows = self.rows[:1]
        return view

    def num_bytes(self) -> int:
        """Memory of all that is stored."""
        return sum(vectors.num_bytes() for layer in self.layers for vectors in layer)
