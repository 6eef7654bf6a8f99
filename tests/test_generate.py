import dataclasses
import functools
import itertools

import needs
import pytest
import torch
from torch._dynamo.utils import counters

from nsphere.fold import fold
from nsphere.generate import (
    Generation,
    Request,
    Sampling,
    TextStream,
    _compiled_next_logits,
    generate,
    generate_texts,
    probabilities,
)
from nsphere.presets import make_config, make_model
from nsphere.train.tokenizer import ByteTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")


@pytest.fixture(params=["gpt", "ngpt"])
def model(request):
    torch.manual_seed(0)
    config = make_config(request.param, vocab_size=31, context=16, d_model=16, num_layers=2, num_heads=2)
    model = make_model(config)
    with torch.no_grad():  # away from the start, where logits are nearly flat
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def test_greedy_is_the_argmax_of_the_full_forward(model) -> None:
    tokens = [3, 1, 4]
    for token in generate(model, list(tokens), 12, Sampling(temperature=0)):
        with torch.no_grad():
            assert token == model(torch.tensor([tokens]))[0, -1].argmax()
        tokens.append(token)
    assert len(tokens) == 15


def test_past_the_context_the_last_half_is_read_again(model) -> None:
    tokens = [3, 1, 4]
    drawn = list(generate(model, tokens, 40, Sampling(temperature=0)))
    assert len(drawn) == 40
    seen = tokens + drawn[:13]  # 16 tokens: the cache is full, and the 17th is drawn from positions 8 … 15
    with torch.no_grad():
        full = model(torch.tensor([seen]))[0, -1].argmax()
        assert drawn[13] == full
        again = model(torch.tensor([(tokens + drawn[:14])[-8:]]))[0, -1].argmax()
    assert drawn[14] == again


def test_a_seed_draws_the_same_and_another_differently(model) -> None:
    draws = [list(generate(model, [1], 30, Sampling(1.0, seed=seed))) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_what_is_drawn_follows_the_probabilities(model) -> None:
    sampling = Sampling(0.7, top_k=5)
    with torch.no_grad():
        p = probabilities(model(torch.tensor([[2, 7]]))[0, -1], sampling)
    counts = torch.zeros(31)
    for seed in range(400):
        counts[next(generate(model, [2, 7], 1, Sampling(0.7, top_k=5, seed=seed)))] += 1
    assert (counts[p == 0] == 0).all()
    assert (counts / 400 - p).abs().max() < 4 * (0.25 / 400) ** 0.5


def test_temperature_top_k_and_top_p_by_hand() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0]).log_softmax(-1)
    p = logits.exp()
    assert torch.allclose(probabilities(logits, Sampling(1.0)), p)
    assert torch.allclose(probabilities(logits, Sampling(0.5)), p**2 / (p**2).sum())
    assert probabilities(logits, Sampling(0.0)).tolist() == [0, 0, 0, 1]
    assert probabilities(logits, Sampling(1e-30)).tolist() == [0, 0, 0, 1]
    assert probabilities(1e9 * logits, Sampling(1e-30)).tolist() == [0, 0, 0, 1]
    kept = torch.tensor([0, 0, p[2], p[3]])
    assert torch.allclose(probabilities(logits, Sampling(1.0, top_k=2)), kept / kept.sum())
    # p = .03 .09 .24 .64: .64 does not reach .7, .64 + .24 does
    assert torch.allclose(probabilities(logits, Sampling(1.0, top_p=0.7)), kept / kept.sum())
    assert probabilities(logits, Sampling(1.0, top_p=0.6)).tolist() == [0, 0, 0, 1]
    assert torch.allclose(probabilities(logits, Sampling(1.0, top_k=9, top_p=1.0)), p)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature must be a number from 0 up, got -1.0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": 2**63}, "seed must be from 0"),
    ],
)
def test_sampling_that_cannot_be(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "the prompt is empty"), ([1] * 16, "has 16 tokens, the model's context is 16"), ([31], "vocabulary of 31")],
)
def test_prompts_that_cannot_be(model, prompt, message) -> None:
    with pytest.raises(ValueError, match=message):
        next(generate(model, prompt, 5))


def test_generation_is_lazy(model) -> None:
    assert len(list(itertools.islice(generate(model, [1], 10**9), 3))) == 3


def make(architecture="ngpt", **fields):
    torch.manual_seed(0)
    shape = {"vocab_size": 31, "context": 16, "d_model": 16, "num_layers": 2, "num_heads": 2} | fields
    model = make_model(make_config(architecture, **shape))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return fold(model)


PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2]]


def continued(model, requests, **options):
    drawn = [[] for _ in requests]
    for tokens in Generation(model, requests, **options):
        for row, token in tokens.items():
            drawn[row].append(token)
    return drawn


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("gpt", {}),
        ("gpt", {"qk_norm": "rms"}),
        ("ngpt", {}),
        ("ngpt", {"num_kv_heads": 1}),
        ("ngpt", {"convention": "nvidia"}),
        ("gpt", {"convention": "nvidia"}),
        ("ngpt", {"qk_norm": False}),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_of_unequal_length_get_what_each_gets_alone(architecture, fields, temperature) -> None:
    """Past the context, where each row starts again at another time, and however long the others go on."""
    model = make(architecture, **fields).double()
    requests = [
        Request(prompt, n, Sampling(temperature, seed=n)) for prompt, n in zip(PROMPTS, (40, 7, 25), strict=True)
    ]
    together = continued(model, requests)
    assert [len(drawn) for drawn in together] == [40, 7, 25]
    for request, drawn in zip(requests, together, strict=True):
        assert continued(model, [request]) == [drawn]
    assert temperature == 0 or together[0][:20] != together[2][:20]
    assert continued(model, requests, grow=False) == together


def test_greedy_past_the_context_is_the_argmax_of_the_full_forward() -> None:
    model = make()
    for prompt, drawn in zip(PROMPTS, continued(model, [Request(p, 30, Sampling(0.0)) for p in PROMPTS]), strict=True):
        seen, start = list(prompt), 0
        for token in drawn:
            if len(seen) - start > 16:
                start = len(seen) - 8
            assert token == model(torch.tensor([seen[start:]]))[0, -1].argmax()
            seen.append(token)


def test_a_request_stops_at_its_tokens_and_at_its_length() -> None:
    model = make()
    free = continued(model, [Request(p, 12, Sampling(1.0, seed=3)) for p in PROMPTS])
    stop = frozenset({free[0][4]})
    first = free[0].index(free[0][4])
    requests = [Request(PROMPTS[0], 12, Sampling(1.0, seed=3), stop), Request(PROMPTS[1], 12, Sampling(1.0, seed=3))]
    assert continued(model, requests) == [free[0][: first + 1], free[1]]
    assert continued(model, [Request([1], 0)]) == [[]]
    generation = Generation(model, requests[1:])
    drawn = []
    for tokens in generation:
        drawn.append(tokens[0])
        if len(drawn) == 5:
            generation.stop(0)
    assert drawn == free[1][:5]


def test_a_seed_belongs_to_its_request() -> None:
    model = make()
    drawn = continued(model, [Request([1], 20, Sampling(1.0, seed=seed)) for seed in (5, 6, 5)])
    assert drawn[0] == drawn[2] != drawn[1]
    assert continued(model, [Request([1], 20, Sampling(1.0, seed=6))]) == [drawn[1]]


@pytest.mark.parametrize("dtype", ["int8", "fp8", torch.bfloat16])
def test_a_smaller_cache_draws_nearly_the_same(dtype) -> None:
    model = make()
    exact = continued(model, [Request(p, 10, Sampling(0.0)) for p in PROMPTS])
    small = continued(model, [Request(p, 10, Sampling(0.0)) for p in PROMPTS], cache_dtype=dtype)
    same = sum(a == b for x, y in zip(exact, small, strict=True) for a, b in zip(x, y, strict=True))
    assert same >= 15


@needs.compiler
@pytest.mark.parametrize(("architecture", "convention"), [("ngpt", "paper"), ("ngpt", "nvidia"), ("gpt", "nvidia")])
def test_compiled_steps_give_the_same_tokens_and_are_not_compiled_again(monkeypatch, architecture, convention) -> None:
    if (architecture, convention) != ("ngpt", "paper"):  # C++ for one of them; how often is for the tracing to say
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        compiled_anew = functools.cache(_compiled_next_logits.__wrapped__)
        monkeypatch.setattr("nsphere.generate._compiled_next_logits", compiled_anew)
    model = make(architecture, convention=convention, num_layers=1)
    requests = [Request(prompt, 24, Sampling(0.0)) for prompt in PROMPTS]
    expected = continued(model, requests)
    counters.clear()
    assert continued(model, requests, compile=True) == expected
    # reading 13 tokens padded to 16, decoding, and reading one row's last 8 again
    assert counters["stats"]["unique_graphs"] == 3
    assert continued(model, [dataclasses.replace(r, prompt=r.prompt[-9:]) for r in requests], compile=True)
    assert counters["stats"]["unique_graphs"] == 3
    generate_more = continued(model, [dataclasses.replace(r, max_new_tokens=50) for r in requests], compile=True)
    assert [len(drawn) for drawn in generate_more] == [50] * 3
    assert counters["stats"]["unique_graphs"] == 3


class TestTextStream:
    def stream(self, text: str, *stop: str) -> tuple[list[str], str]:
        """What each byte released, and what the end did."""
        stream = TextStream(ByteTokenizer().decode, stop)
        pieces = []
        for byte in text.encode() if isinstance(text, str) else text:
            pieces.append(stream.push(byte))
            if stream.stopped:
                return pieces, "(stopped)" + stream.finish()
        return pieces, stream.finish()

    def test_characters_come_whole(self) -> None:
        assert self.stream("aé€") == (["a", "", "é", "", "", "€"], "")
        assert self.stream("é€".encode()[:-1]) == (["", "é", "", ""], "\ufffd")
        broken = b"a" + b"\xff" * 20 + b"b"
        pieces, rest = self.stream(broken)
        assert "".join(pieces) + rest == broken.decode(errors="replace")
        assert "".join(pieces).count("\ufffd") >= 8  # what never becomes whole does not hold back the rest for good

    def test_a_stop_string_ends_the_text_and_is_no_part_of_it(self) -> None:
        assert self.stream("ab\n\ncd", "\n\n") == (["a", "b", "", ""], "(stopped)")
        assert self.stream("ab\ncd", "\n\n") == (["a", "b", "", "\nc", "d"], "")
        assert self.stream("ab\n", "\n\n") == (["a", "b", ""], "\n")
        assert self.stream("aab", "ab", "zz") == (["", "a", ""], "(stopped)")
        assert self.stream("xéy", "é") == (["x", "", ""], "(stopped)")
        with pytest.raises(ValueError, match="a stop string is empty"):
            self.stream("", "")

    def test_subwords_that_decode_differently_together(self) -> None:
        """A space that a tokenizer drops at the beginning of a text must not be dropped in its middle."""
        words = ["▁one", "▁two", "s", "▁three"]
        stream = TextStream(lambda tokens: "".join(words[t] for t in tokens).replace("▁", " ").removeprefix(" "))
        assert "".join(stream.push(t) for t in range(4)) + stream.finish() == "one twos three"


def test_texts_side_by_side() -> None:
    model = make(vocab_size=256, context=32)
    texts = ["ab", "abcdefghijkl"]
    together: dict[int, str] = {0: "", 1: ""}
    for row, piece in generate_texts(model, ByteTokenizer(), texts, 40, Sampling(1.0, seed=4), stop_at_separator=False):
        together[row] += piece
    for i, text in enumerate(texts):
        tokens = list(generate(model, list(text.encode()), 40, Sampling(1.0, seed=4 + i)))
        assert together[i] == ByteTokenizer().decode(tokens)
    stop = together[0][10:12]
    for row, piece in generate_texts(
        model, ByteTokenizer(), texts, 40, Sampling(1.0, seed=4), stop=[stop], stop_at_separator=False
    ):
        together[row] = together[row].removeprefix(piece)
    assert together[0].startswith(stop)


def test_a_text_ends_at_the_separator() -> None:
    model = make(vocab_size=256, context=32)
    for separator, expected in ((65, ""), (66, "AAAAA"), (None, "AAAAA")):
        tokenizer = ByteTokenizer()
        tokenizer.separator_id = separator
        with torch.no_grad():  # A is the likeliest, whatever came before
            model.head.weight.zero_()
            h = model.final_norm(model.hidden(torch.tensor([[120, 65, 65, 65, 65]])))[0]
            model.head.weight[65] = torch.linalg.lstsq(h, torch.ones(5, 1)).solution[:, 0]
        pieces = generate_texts(model, tokenizer, ["x"], 5, Sampling(0.0))
        assert "".join(piece for _, piece in pieces) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": "ab"}, "prompts is a list of texts, got 'ab'"),
        ({"stop": "ab"}, "stop is a list of texts, got 'ab'"),
        ({"tokenizer": None}, "the tokenizer is that of the run, got a NoneType"),
        ({"max_new_tokens": -1}, "max_new_tokens must be a whole number of at least 0, got -1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number of at least 0, got 1.5"),
        ({"sampling": 0.0}, "sampling is a Sampling, got 0.0; give Sampling"),
        ({"cache_dtype": 8}, "a cache of 8 is not supported; give a floating dtype"),
        ({"cache_dtype": "int4"}, "a cache of 'int4' is not supported; choose"),
        ({"cache_dtype": torch.int8}, "a cache of torch.int8 is not supported; give a floating dtype"),
        ({"prompts": ["x" * 32]}, "has 32 tokens, the model's context is 32"),
        ({"model": torch.nn.Linear(2, 2)}, "a GPT or NGPT of this library generates here, got a Linear"),
    ],
)
def test_texts_that_cannot_be_made(change, message) -> None:
    asked = {"model": make(vocab_size=256, context=32), "tokenizer": ByteTokenizer(), "prompts": ["a"]}
    with pytest.raises(ValueError, match=message):
        generate_texts(**{**asked, "max_new_tokens": 3, **change})


def test_a_cache_goes_by_its_name_too() -> None:
    model = make()
    assert list(generate(model, [3], 9, Sampling(0.0), "bfloat16")) == list(
        generate(model, [3], 9, Sampling(0.0), torch.bfloat16)
    )
    for prompt in ("abc", [1.5], torch.ones(1, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match="a prompt is a sequence of token numbers"):
            next(generate(model, prompt, 3))
    with pytest.raises(ValueError, match="sampling is a Sampling, got 0.0; give Sampling"):
        next(generate(model, [3], 3, 0.0))
    with pytest.raises(ValueError, match="max_new_tokens must be a whole number of at least 0, got 2.5"):
        next(generate(model, [3], 2.5))
    greedy = Sampling(0.0)
    assert list(generate(model, torch.tensor([3, 1]), 9, greedy)) == list(generate(model, [3, 1], 9, greedy))


@pytest.mark.parametrize("tokens", [torch.ones(2, 3), torch.ones(3, dtype=torch.long), torch.ones(1, 3) > 0])
def test_what_is_no_row_of_tokens(tokens) -> None:
    for call in (make(), make("gpt").forward):
        with pytest.raises(ValueError, match=r"tokens are int64 \[B, T\], got torch"):
            call(tokens)
    row = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"tokens are \[1, 3\] and targets \[1, 4\]"):
        make().loss(row, torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize("prompts", [[], [[]], [[1], [1] * 16], [[31]]])
def test_requests_that_cannot_be(prompts) -> None:
    with pytest.raises(ValueError, match="no prompt|is empty|has 16 tokens|vocabulary of 31"):
        Generation(make(), [Request(prompt, 3) for prompt in prompts])
