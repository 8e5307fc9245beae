import copy

import pytest
import torch

from revdeq_lightning.equilibrium import (
    BackpropAdjoint,
    DivergenceError,
    MomentumSolver,
    PicardSolver,
    RelaxedSolver,
    ReversibleSolver,
    checks,
)
from revdeq_lightning.models import KeyValueCache, generate
from revdeq_lightning.models.generation import sample
from tests.helpers.modules import KINDS, SMALL, make_batch, make_model

CONTEXT = SMALL["context_length"]
SOLVERS = {
    "reversible": ReversibleSolver(beta=0.8, max_steps=3),
    "momentum": MomentumSolver(max_steps=5),
    "relaxed": RelaxedSolver(beta=0.7, max_steps=4),
    "picard": PicardSolver(max_steps=4),
}
CASES = [(kind, name) for kind in KINDS[:-1] for name in SOLVERS] + [("explicit", "reversible")]


def make_case(kind="modern", solver="momentum"):
    adjoint = BackpropAdjoint() if solver in ("relaxed", "picard") else None
    return make_model(kind, solver=SOLVERS[solver], adjoint=adjoint).eval()


def test_a_divergence_that_the_host_learns_late_is_told_before_a_token_is_drawn(monkeypatch):
    monkeypatch.setattr(checks, "host_must_wait", lambda device: True)  # as on a GPU
    model = make_case()
    with torch.no_grad():
        next(model.equilibrium.f.parameters()).fill_(torch.nan)
    with pytest.raises(DivergenceError):
        generate(model, make_batch()[0][:, :5], max_new_tokens=1)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "solver"), CASES)
def test_cached_logits_equal_uncached_ones(kind, solver):
    model, (tokens, _) = make_case(kind, solver), make_batch()
    cache = KeyValueCache(CONTEXT)
    cached = [model(tokens[:, :5], cache).logits_BTV]
    cached += [model(tokens[:, i : i + 1], cache).logits_BTV for i in range(5, CONTEXT)]
    torch.testing.assert_close(torch.cat(cached, 1), model(tokens).logits_BTV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_generated_text_equals_uncached_one_beyond_the_context(kind, temperature):
    model, (tokens, _) = make_case(kind), make_batch()
    texts = []
    for use_cache in (True, False):
        settings = {"temperature": temperature, "generator": torch.Generator().manual_seed(3), "use_cache": use_cache}
        texts.append(generate(model, tokens[:, :4], 17, **settings))
    assert texts[0].shape == (3, 21)
    assert torch.equal(texts[0][:, :4], tokens[:, :4])
    assert torch.equal(*texts)


def test_greedy_text_is_the_most_likely_token_of_the_last_window():
    """Oracle: windows by hand. A full context is followed by its last half, the new token included."""
    model, (tokens, _) = make_case(), make_batch(1)
    window, expected = tokens[:, :10], []
    for _ in range(12):
        expected.append(model(window).logits_BTV[:, -1].argmax(-1, keepdim=True))
        window = torch.cat([window, expected[-1]], 1)
        if window.shape[1] > CONTEXT:
            window = window[:, -CONTEXT // 2 :]
    text = generate(model, tokens[:, :10], 12, temperature=0)
    assert torch.equal(text[:, 10:], torch.cat(expected, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_token_costs_one_solve_over_one_token_and_a_full_context_one_over_half_of_it(kind):
    """Whatever the length of the text: the time per token does not grow with it."""
    model, (tokens, _) = make_case(kind), make_batch(1)
    block = model.block if kind == "explicit" else model.equilibrium.f
    lengths, forward = [], block.forward
    block.forward = lambda z, x, *args: lengths.append(z.shape[1]) or forward(z, x, *args)
    generate(model, tokens[:, :8], 14)
    evaluations = 1 if kind == "explicit" else 5
    assert lengths == [n for n in (8, 1, 1, 1, 1, 6, 1, 1, 1, 1, 1, 1, 6, 1) for _ in range(evaluations)]


@torch.no_grad()
def test_cache_memory_is_allocated_once():
    model, (tokens, _) = make_case(), make_batch(1)
    cache = KeyValueCache(CONTEXT)
    model(tokens[:, :2], cache)
    before = [t.data_ptr() for slot in cache._slots for t in slot]
    assert len(before) == 1 + 2 * 5  # what the convolution looks back at; keys and values of each evaluation
    for i in range(2, CONTEXT):
        model(tokens[:, i : i + 1], cache)
    assert [t.data_ptr() for slot in cache._slots for t in slot] == before
    assert cache.length == CONTEXT


def test_text_is_a_function_of_the_seed():
    model, (tokens, _) = make_case(), make_batch(1)
    texts = [generate(model, tokens[:, :3], 9, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_samples_follow_the_softmax():
    logits, draws = torch.tensor([0.3, 1.2, -0.5, 2.0]), 20_000
    tokens = sample(
        logits.expand(draws, 4), temperature=0.7, top_k=None, top_p=None, generator=torch.Generator().manual_seed(0)
    )
    frequencies = tokens.flatten().bincount(minlength=4) / draws
    torch.testing.assert_close(frequencies, (logits / 0.7).softmax(-1), rtol=0, atol=0.015)  # 4 standard deviations


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.4}, [3]),
        ({"top_p": 0.5}, [3]),
        ({"top_p": 0.51}, [1, 3]),
        ({"top_p": 0.95}, [0, 1, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_k": 3, "top_p": 0.82}, [1, 3]),  # of the three, 0.5 and 0.3 have 0.84 together
        ({"temperature": 0}, [3]),
    ],
)
def test_top_k_and_top_p_keep_the_most_likely(arguments, kept):
    logits = torch.tensor([0.15, 0.3, 0.05, 0.5]).log().expand(2000, 4)
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, "generator": torch.Generator().manual_seed(0)}
    assert sample(logits, **{**settings, **arguments}).unique().tolist() == kept


def test_model_is_evaluated_in_eval_mode_and_left_as_it_was():
    model, (tokens, _) = make_case().train(), make_batch(1)
    modes = []
    model.norm.register_forward_hook(lambda module, *_: modes.append(module.training))
    text = generate(model, tokens[:, :3], 2, temperature=0)
    assert modes == [False, False]
    assert model.training
    assert not text.requires_grad


@torch.no_grad()
def test_another_number_of_evaluations_is_noticed():
    model, (tokens, _) = make_case(), make_batch(1)
    for max_steps, message in (
        (6, "more often than the first one, 6 times"),
        (4, "used the cache 5 times, the first one 6 times"),
    ):
        cache = KeyValueCache(CONTEXT)
        model.equilibrium.solver = MomentumSolver(max_steps=5)
        model(tokens[:, :3], cache)
        model.equilibrium.solver = MomentumSolver(max_steps=max_steps)
        with pytest.raises(RuntimeError, match=message):
            model(tokens[:, 3:4], cache)


def test_under_autocast_in_float64_and_with_a_tolerance():
    model, (tokens, _) = make_case(), make_batch(1)
    settings = {"temperature": 0, "use_cache": False}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generate(model, tokens[:, :3], 12).shape == (1, 15)
    double = copy.deepcopy(model).double()
    assert torch.equal(
        generate(double, tokens[:, :3], 12, temperature=0), generate(double, tokens[:, :3], 12, **settings)
    )
    model.equilibrium.solver = MomentumSolver(max_steps=5, rtol=1e-3)
    with pytest.raises(ValueError, match=r"fixed number of steps, got a solver with rtol=0.001.*: set use_cache=False"):
        generate(model, tokens[:, :3], 2)
    assert generate(model, tokens[:, :3], 2, **settings).shape == (1, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.5}, r"temperature must be in \[0, inf\), got -0.5"),
        ({"temperature": float("nan")}, "got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"tokens_BT": torch.zeros(1, 0, dtype=torch.int64)}, r"1 <= T <= 12 \(the context\), got \(1, 0\)"),
        ({"tokens_BT": torch.zeros(1, 13, dtype=torch.int64)}, r"1 <= T <= 12 \(the context\), got \(1, 13\)"),
        ({"tokens_BT": torch.tensor([1, 2])}, r"shape \(B, T\) .* got \(2,\)"),
        ({"tokens_BT": torch.tensor([[1, 23]])}, "token 23 is not in the vocabulary of 23"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(make_case(), **{"tokens_BT": torch.tensor([[1, 2]]), "max_new_tokens": 1, **arguments})
