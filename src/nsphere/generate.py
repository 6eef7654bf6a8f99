"""Text from a model: sampling with a key/value cache, a token at a time, for one prompt or many side by side."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nsphere.kv_cache import CacheDtype, KVCache
from nsphere.layers import Decoder, DecoderConfig


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits."""

    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Draw among the k likeliest tokens only."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together have at least this probability."""
    seed: int = 0
    """Of the draw."""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.temperature != float("inf")):
            raise ValueError(f"temperature must be a number from 0 up, got {self.temperature}; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}; leave it out to draw among all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}; leave it out to draw among all tokens")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that is drawn from: logits [..., V] → probabilities [..., V] in fp32.

    Temperature first, then top-k, then top-p on what is left. Tokens as likely as the last one kept stay in.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # ≤ 0: no temperature is too low
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p = logits.softmax(-1)
    if sampling.top_p is not None:
        ordered = p.sort(-1, descending=True).values
        # a token stays if those likelier than it do not yet reach top_p
        num_kept = ((ordered.cumsum(-1) - ordered) < sampling.top_p).sum(-1, keepdim=True)
        p = p.masked_fill(p < ordered.gather(-1, num_kept - 1), 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be continued."""

    prompt: Sequence[int]
    """At least one token, fewer than the model's context."""
    max_new_tokens: int
    """How many tokens to draw at most."""
    sampling: Sampling = field(default_factory=Sampling)
    """How they are drawn; each request has a random stream of its own, from its seed."""
    stop_tokens: frozenset[int] = frozenset()
    """Tokens that end the continuation; they are its last one."""


class _Row:
    """A request under way."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.seen = [int(token) for token in request.prompt]
        self.num_cached = 0
        self.num_drawn = 0
        self.going = request.max_new_tokens > 0
        # drawn on the CPU, so that a seed gives the same text on every device with the same logits
        self.random = torch.Generator(device="cpu").manual_seed(request.sampling.seed)

    def draw(self, logits: Tensor) -> int:
        sampling = self.request.sampling
        if sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(probabilities(logits, sampling), 1, generator=self.random))
        self.seen.append(token)
        self.num_drawn += 1
        self.going = self.num_drawn < self.request.max_new_tokens and token not in self.request.stop_tokens
        return token


class Generation:
    """Requests continued side by side: each step draws one token for every row that is still going.

    >>> for tokens in Generation(fold(model), requests):
    ...     for row, token in tokens.items(): ...

    A row gets the tokens that it would get alone, up to the rounding of its logits. The cache holds as many tokens as
    the model's context. When a row's part is full, its last half is read in again and the row goes on from there: the
    model never sees positions that it was not trained on.

    Args:
        model: in the autocast that is on, if any; best a folded one (see `nsphere.fold`).
        requests: at least one.
        cache_dtype: of keys and values; if not given autocast's where that is on, else the model's. "int8" and "fp8"
            take a quarter of fp32's memory.
        grow: let the cache grow with the rows, rather than lay all its memory out at the start, as compiled steps
            need it.
        compile: compile the steps. A decoding step is compiled once, whatever the rows' lengths; prompts once for
            every power of two.

    Raises:
        ValueError: another kind of model, no request, an empty prompt, one that fills the context, tokens outside the
            vocabulary, or a cache_dtype that keys and values can't be stored in.
    """

    def __init__(
        self,
        model: Decoder,
        requests: Sequence[Request],
        *,
        cache_dtype: CacheDtype | None = None,
        grow: bool = True,
        compile: bool = False,
    ) -> None:
        if not isinstance(getattr(model, "config", None), DecoderConfig):
            raise ValueError(f"a GPT or NGPT of this library generates here, got a {type(model).__name__}")
        if not requests:
            raise ValueError("there is no prompt; give at least one")
        for request in requests:
            _check(request, model)
        self.model, self.compiled = model, compile
        self.device = model.device
        self.rows = [_Row(request) for request in requests]
        if cache_dtype is None and torch.is_autocast_enabled(self.device.type):
            cache_dtype = torch.get_autocast_dtype(self.device.type)
        elif cache_dtype is None:
            cache_dtype = next(model.parameters()).dtype
        self.cache = model.make_cache(len(requests), model.config.context, cache_dtype, grow=grow and not compile)
        self._next_logits = _compiled_next_logits() if compile else _next_logits

    def stop(self, row: int) -> None:
        """Draw no more for this row."""
        self.rows[row].going = False

    @torch.no_grad()
    def __iter__(self) -> Iterator[dict[int, int]]:
        """Row → token, of the rows that are going, until none is."""
        context = self.model.config.context
        while going := [i for i, row in enumerate(self.rows) if row.going]:
            if all(row.num_cached == 0 for row in self.rows):
                logits = dict(enumerate(self._read(self.cache, self.rows)))
            else:
                full = [i for i in going if self.rows[i].num_cached == context]
                logits = {i: self._read(self.cache.row(i), [self.rows[i]], max(1, context // 2))[0] for i in full}
                if len(full) < len(going):
                    decoded = self._decode([i for i in going if i not in full])
                    logits = dict(enumerate(decoded)) | logits
            yield {i: self.rows[i].draw(logits[i]) for i in going}

    def _read(self, cache: KVCache, rows: list[_Row], most: int | None = None) -> Tensor:
        """Read rows into the cache from its first slot, of each the last `most` tokens: logits [B, V] after them."""
        parts = [row.seen if most is None else row.seen[-most:] for row in rows]
        longest = max(map(len, parts))
        if self.compiled:
            longest = min(self.model.config.context, max(8, 1 << (longest - 1).bit_length()))
        # what stands behind a row's end is overwritten before it is looked at
        tokens = torch.tensor([[*part, *[0] * (longest - len(part))] for part in parts])
        for row, part in zip(rows, parts, strict=True):
            row.num_cached = len(part)
        cache.reserve(longest)
        return self._run(cache, tokens, torch.arange(longest).expand_as(tokens), [len(part) - 1 for part in parts])

    def _decode(self, going: list[int]) -> Tensor:
        """The logits [B, V] after each row's last token, of use for the rows `going`."""
        context = self.model.config.context
        tokens = torch.tensor([row.seen[-1:] for row in self.rows])
        # a row that is idle writes where its next token will, or into a slot that it has no more use for
        positions = [min(row.num_cached, context - 1) for row in self.rows]
        for i in going:
            self.rows[i].num_cached += 1
        self.cache.reserve(context if self.compiled else max(positions) + 1)
        return self._run(self.cache, tokens, torch.tensor(positions).unsqueeze(-1), [0] * len(self.rows))

    def _run(self, cache: KVCache, tokens: Tensor, positions: Tensor, last: list[int]) -> Tensor:
        arguments = (t.to(self.device) for t in (tokens, positions, torch.tensor(last)))
        return self._next_logits(self.model, cache, *arguments).float().cpu()


def _next_logits(model: Decoder, cache: KVCache, tokens: Tensor, positions: Tensor, last: Tensor) -> Tensor:
    """Tokens [B, T] at positions [B, T] → logits [B, V] after the token `last` [B] of each row."""
    h = model.hidden(tokens, cache=cache, positions=positions)
    h = model.final_norm(h[torch.arange(len(last), device=last.device), last])
    return F.linear(h, model.output_weight())


@functools.cache
def _compiled_next_logits() -> Callable[..., Tensor]:
    import torch._dynamo

    # the limit is for code that compiles again and again; here there is a piece for every power of two
    many_pieces = torch._dynamo.config.patch(recompile_limit=256)
    return many_pieces(torch.compile(_next_logits, dynamic=False, fullgraph=True))


def _check(request: Request, model: Decoder) -> None:
    context, vocab_size, prompt = model.config.context, model.config.vocab_size, request.prompt
    try:
        prompt = [operator.index(token) for token in prompt]
    except TypeError:
        raise ValueError(
            f"a prompt is a sequence of token numbers, got {request.prompt!r:.80}; encode a text first"
        ) from None
    if not isinstance(request.max_new_tokens, Integral) or request.max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be a whole number of at least 0, got {request.max_new_tokens!r}")
    _check_sampling(request.sampling)
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token, such as the document separator")
    if len(prompt) >= context:
        raise ValueError(f"the prompt has {len(prompt)} tokens, the model's context is {context}; shorten the prompt")
    if not all(0 <= token < vocab_size for token in prompt):
        raise ValueError(f"the prompt has tokens outside the vocabulary of {vocab_size}; is it another tokenizer's?")


def _check_sampling(sampling: Sampling) -> None:
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling is a Sampling, got {sampling!r:.80}; give Sampling(temperature=…)")


def generate(
    model: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    cache_dtype: CacheDtype | None = None,
    *,
    compile: bool = False,
) -> Iterator[int]:
    """Continue one prompt, yielding each token as it is drawn; see `Generation`."""
    request = Request(prompt, max_new_tokens, Sampling() if sampling is None else sampling)
    for tokens in Generation(model, [request], cache_dtype=cache_dtype, compile=compile):
        yield tokens[0]


class TextTokenizer(Protocol):
    """What text generation needs of a tokenizer."""

    separator_id: int | None

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""
        ...


class TextStream:
    """Tokens in, text out, as soon as it is certain.

    Held back are the bytes of a character that is not whole yet, and what may be the beginning of a stop string.

    Args:
        decode: of the tokenizer.
        stop: strings that end the text and are no part of it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise ValueError("a stop string is empty; give at least one character, or leave it out")
        self.decode, self.stop_strings = decode, tuple(stop)
        self._tokens: list[int] = []
        self._start = self._read = 0  # of the tokens that give context to what is decoded, and of what is new
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """One more token; the text that is certain by now, and was not before."""
        self._tokens.append(token)
        # two tokens may decode to other text together than apart, so some that are known already go along
        known = self.decode(self._tokens[self._start : self._read])
        text = self.decode(self._tokens[self._start :])
        if text.endswith("\ufffd") and len(self._tokens) - self._read < 8:
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return self._release(text[len(known) :])

    def finish(self) -> str:
        """What was held back: there are no more tokens."""
        if self.stopped:
            return ""
        known = self.decode(self._tokens[self._start : self._read])
        text = self.decode(self._tokens[self._start :])[len(known) :]
        self._start = self._read = len(self._tokens)
        released = self._release(text)
        held, self._held = self._held, ""
        return released + held

    def _release(self, new: str) -> str:
        text = self._held + new
        ends = [at for stop in self.stop_strings if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        beginnings = (stop[:n] for stop in self.stop_strings for n in range(1, len(stop)))
        certain = len(text) - max((len(b) for b in beginnings if text.endswith(b)), default=0)
        self._held = text[certain:]
        return text[:certain]


def generate_texts(
    model: Decoder,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    stop: Sequence[str] = (),
    stop_at_separator: bool = True,
    cache_dtype: CacheDtype | None = None,
    compile: bool = False,
) -> Iterator[tuple[int, str]]:
    r"""Continue texts side by side: (index of the prompt, piece of text), as they are made.

    >>> for row, piece in generate_texts(fold(run.model), run.tokenizer, ["def ", "class "], 100, stop=["\n\n"]): ...

    Args:
        model: in the autocast that is on, if any.
        tokenizer: of the model.
        prompts: at least one; none empty.
        max_new_tokens: how many to draw for each.
        sampling: how; prompt i has the seed `sampling.seed + i`.
        stop: strings that end a text and are no part of it.
        stop_at_separator: end a text at the tokenizer's end-of-document token.
        cache_dtype: see Generation.
        compile: see Generation.

    Raises:
        ValueError: as Generation; for an empty stop string, and for one text where a list of them is asked for.
    """
    for name, texts in (("prompts", prompts), ("stop", stop)):
        if isinstance(texts, str):
            raise ValueError(f"{name} is a list of texts, got {texts!r:.80}; put it into a list")
    if not hasattr(tokenizer, "encode") or not hasattr(tokenizer, "separator_id"):
        raise ValueError(f"the tokenizer is that of the run, got a {type(tokenizer).__name__}")
    sampling = Sampling() if sampling is None else sampling
    _check_sampling(sampling)
    ends = frozenset({tokenizer.separator_id} if stop_at_separator and tokenizer.separator_id is not None else ())
    requests = [
        Request(tokenizer.encode(prompt), max_new_tokens, dataclasses.replace(sampling, seed=sampling.seed + i), ends)
        for i, prompt in enumerate(prompts)
    ]
    streams = [TextStream(tokenizer.decode, stop) for _ in prompts]
    generation = Generation(model, requests, cache_dtype=cache_dtype, compile=compile)

    def pieces() -> Iterator[tuple[int, str]]:
        for tokens in generation:
            for i, token in tokens.items():
                piece = "" if token in ends else streams[i].push(token)
                if streams[i].stopped:
                    generation.stop(i)
                elif not generation.rows[i].going:
                    piece += streams[i].finish()
                if piece:
                    yield i, piece

    return pieces()  # of which what can be refused has been
