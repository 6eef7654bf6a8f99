import itertools

import pytest
import torch

from nsphere.generate import Sampling, generate, probabilities
from nsphere.presets import make_config, make_model


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
