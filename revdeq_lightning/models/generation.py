"""Generate text with a language model, with or without a key-value cache for every evaluation of f."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from revdeq_lightning.equilibrium import settle_checks
from revdeq_lightning.equilibrium.validation import require_count, require_in_range
from revdeq_lightning.models.transformer import AbstractLanguageModel
from revdeq_lightning.models.transformer_blocks import KeyValueCache
from revdeq_lightning.processes import is_sharded


@torch.no_grad()
def generate(
    model: AbstractLanguageModel,
    tokens_BT: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    warm_start: bool = False,
) -> Tensor:
    """Continue a text.

    When the context is full, the model continues from its second half, which it reads again: one pass over half a
    context per half a context, a constant cost per token.

    Args:
        model: The language model, evaluated in eval mode.
        tokens_BT: Prompts of equal length, at least one token.
        max_new_tokens: Number of tokens to add.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Draw from the k most likely tokens.
        top_p: Draw from the smallest set of most likely tokens with at least this total probability.
        generator: Random generator on the device of the model; None for the default generator.
        use_cache: False reads the complete context for each token: slow, but works with any solver.
        warm_start: Without the cache, start each solve from the states of the last one, and a new token from the state
            of the previous token. Earlier tokens do not depend on later ones, so their states are already solved.

    Returns:
        Prompt and continuation, shape `(B, T + max_new_tokens)`.

    Raises:
        ValueError: If an argument is out of range; if the prompt is empty, longer than the context, or not in the
            vocabulary; if the solver has a tolerance, because a cache is exact only with a fixed number of evaluations;
            or if it has none with a warm start, which would change the text.
    """
    require_count("max_new_tokens", max_new_tokens, at_least=0)
    require_in_range("temperature", temperature, "[0, inf)")
    if top_k is not None:
        require_count("top_k", top_k)
    if top_p is not None:
        require_in_range("top_p", top_p, "(0, 1]")
    context_length = model.config.context_length
    if tokens_BT.dim() != 2 or not 1 <= tokens_BT.shape[1] <= context_length:
        raise ValueError(
            f"the prompt must have shape (B, T) with 1 <= T <= {context_length} (the context), "
            f"got {tuple(tokens_BT.shape)}"
        )
    model.config.check_tokens(tokens_BT)
    if use_cache and (fault := cache_fault(model)):
        raise ValueError(f"{fault}: set use_cache=False")
    solver = getattr(getattr(model, "equilibrium", None), "solver", None)
    if warm_start and (use_cache or solver is None or not solver.has_tolerance):
        raise ValueError(
            f"warm_start=True needs a solver with a tolerance and use_cache=False, got {solver} and"
            f" use_cache={use_cache}: a fixed number of steps from another start would change the text"
        )

    reader = TextReader(model, use_cache)
    text = [tokens_BT]
    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.eval()
        if warm_start:
            stack.enter_context(_warm_started(model))
        for _ in range(max_new_tokens):
            logits_BV = model.head(reader.read(text[-1])[:, -1])
            settle_checks()  # a GPU could not draw from NaN
            text.append(sample(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator))
    return torch.cat(text, 1)


class TextReader:
    """Reads a text, first its beginning and then token by token, with or without a key-value cache.

    When the context is full, it continues from its second half, which it reads again.
    """

    def __init__(self, model: AbstractLanguageModel, use_cache: bool) -> None:
        self._model, self._window_BT = model, torch.empty(0)
        self._cache = KeyValueCache(model.config.context_length) if use_cache else None

    def read(self, tokens_BT: Tensor) -> Tensor:
        """Inputs of the output projection at these tokens, after those read before; `(B, T, D)`."""
        num_new, length = tokens_BT.shape[1], self._model.config.context_length
        whole_BT = torch.cat([self._window_BT, tokens_BT], 1) if self._window_BT.numel() else tokens_BT
        if whole_BT.shape[1] > length and self._window_BT.numel():
            whole_BT = tokens_BT = whole_BT[:, -max(1, length // 2) :]
            self._cache = KeyValueCache(length) if self._cache else None
        self._window_BT = whole_BT
        h_BTD, _ = self._model.hidden(tokens_BT if self._cache else whole_BT, self._cache)
        return h_BTD[:, -num_new:]


def sample(
    logits_BV: Tensor, *, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Draw one token per row, `(B, 1)`."""
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    probs_BV = (logits_BV.float() / temperature).softmax(-1)
    probs_BV, tokens_BV = torch.sort(probs_BV, dim=-1, descending=True, stable=True)
    if top_k is not None:
        probs_BV[:, top_k:] = 0
        probs_BV /= probs_BV.sum(-1, keepdim=True)
    if top_p is not None:
        # Keep a token if the previous ones do not reach top_p, so always the first.
        probs_BV[probs_BV.cumsum(-1) - probs_BV >= top_p] = 0
    # Drawn in the order of the vocabulary, as transformers does: a seed gives the same text there.
    probs_BV = torch.zeros_like(probs_BV).scatter(-1, tokens_BV, probs_BV)
    return torch.multinomial(probs_BV, 1, generator=generator)


def cache_fault(model: Any) -> str | None:
    """Why a key-value cache would change the text or cannot be used; None if it can be used."""
    solver = getattr(getattr(model, "equilibrium", None), "solver", None)
    if not model.config.has_cache:
        return f"block={model.config.block!r} has no cache of keys and values"
    if solver is not None and solver.has_tolerance:
        return (
            "generation with a cache needs a fixed number of steps, got a solver with"
            f" rtol={solver.rtol}, atol={solver.atol}"
        )
    # The cache evaluates f outside its layer, but FSDP2 gathers parameters only for the layer.
    return "the parameters are sharded" if any(map(is_sharded, model.parameters())) else None


@contextmanager
def _warm_started(model: Any) -> Iterator[None]:
    """Context in which each solve of the model starts where the last one ended."""
    states: list[Tensor] = []

    def start(layer: Any, args: Any) -> Any:
        x_BTD = args[0]
        if not states:
            return args
        z_BTD = states.pop()
        return x_BTD, torch.cat([z_BTD, z_BTD[:, -1:]], 1)[:, -x_BTD.shape[1] :]

    def keep(layer: Any, args: Any, solution: Any) -> None:
        states.append(solution.value)

    with model.equilibrium.register_forward_pre_hook(start), model.equilibrium.register_forward_hook(keep):
        yield


def continue_text(model: Any, tokenizer: Any, prompt: str, *, seed: int = 0, **sampling: Any) -> str:
    """Return prompt and continuation; only the end of a prompt longer than the context is read.

    Solvers with a tolerance generate without the cache, which is exact only for a fixed number of evaluations.
    """
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt must not be empty")
    device = model.output_weight_VD.device
    context_length = model.config.context_length
    tokens_BT = torch.tensor([ids[-context_length:]], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    use_cache = cache_fault(model) is None
    new = generate(model, tokens_BT, generator=generator, use_cache=use_cache, **sampling)[0, tokens_BT.shape[1] :]
    # A padded vocabulary has ids without text, which an untrained model may draw.
    text: str = tokenizer.decode([i for i in new.tolist() if i < tokenizer.vocab_size])
    return prompt + text
