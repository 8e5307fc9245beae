"""Language models as those of the `transformers` library, which only this file imports.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads what `save_pretrained` wrote: the folder's
`modeling_revdeq.py` imports this package.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from typing_extensions import override

from revdeq_lightning.equilibrium import settle_checks
from revdeq_lightning.models.build import SolverConfig, build_language_model
from revdeq_lightning.models.config import TransformerConfig
from revdeq_lightning.models.generation import TextReader, cache_fault
from revdeq_lightning.models.transformer import AbstractLanguageModel

_MODULE = "modeling_revdeq"
_AUTO_MAP = {"AutoConfig": f"{_MODULE}.RevDEQConfig", "AutoModelForCausalLM": f"{_MODULE}.RevDEQForCausalLM"}
_CODE = '''"""The model's code is in the package revdeq-lightning."""

try:
    from revdeq_lightning.models.huggingface import RevDEQConfig, RevDEQForCausalLM
except ModuleNotFoundError as error:
    if error.name != "revdeq_lightning":
        raise
    raise ImportError("this model needs the package revdeq-lightning: pip install revdeq-lightning") from None
'''


class RevDEQConfig(PreTrainedConfig):  # type: ignore[misc]
    """Settings of a language model.

    Args:
        network: Fields of `TransformerConfig`.
        solver: Fields of `SolverConfig` except `max_steps`.
        max_steps: Solver steps; may be changed at any time. None for a model without solver.
        kwargs: Settings that all models of `transformers` have.
    """

    model_type = "revdeq"
    vocab_size = property(lambda self: self.network["vocab_size"])
    hidden_size = property(lambda self: self.network["d_model"])
    max_position_embeddings = property(lambda self: self.network["context_length"])

    register_for_auto_class = classmethod(lambda cls, auto_class=None: None)  # the folder's code is not this file

    def __init__(self, network: Any = None, solver: Any = None, max_steps: int | None = None, **kwargs: Any) -> None:
        self.network, self.solver, self.max_steps = network or {}, solver or {}, max_steps
        super().__init__(**kwargs | {"tie_word_embeddings": False, "auto_map": _AUTO_MAP})


class PromptCache:
    """What is kept from token to token: the texts read so far, those after equal padding together.

    Without an exact key-value cache (a tolerance, a user-defined block), each token reads the context again.
    """

    is_compileable = is_croppable = False

    def __init__(self, model: AbstractLanguageModel, goes_on: bool) -> None:
        self._model, self._goes_on, self._length = model, goes_on, 0
        self._readers: list[tuple[int, Tensor, TextReader]] = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read, with padding."""
        return self._length

    def read(self, tokens_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Inputs of the output projection at the new tokens; zero at padding before a text."""
        if not self._readers:
            use_cache = self._goes_on and cache_fault(self._model) is None
            groups = self._groups(tokens_BT, mask_BT)
            self._readers = [(start, rows, TextReader(self._model, use_cache)) for start, rows in groups]
        begins = [max(0, start - self._length) for start, *_ in self._readers]
        self._length += tokens_BT.shape[1]
        parts = [reader.read(tokens_BT[rows, b:]) for b, (_, rows, reader) in zip(begins, self._readers, strict=True)]
        if begins == [0]:
            return parts[0]
        h_BTD = parts[0].new_zeros(*tokens_BT.shape, parts[0].shape[-1])
        for b, (_, rows, _), part_BTD in zip(begins, self._readers, parts, strict=True):
            h_BTD[rows, b:] = part_BTD
        return h_BTD

    def _groups(self, tokens_BT: Tensor, mask_BT: Tensor | None) -> list[tuple[int, Tensor]]:
        """Rows after equal padding, with its length."""
        if mask_BT is None or mask_BT.all():
            return [(0, torch.arange(len(tokens_BT), device=tokens_BT.device))]
        changes_BT = mask_BT.bool().int().diff(dim=1, prepend=torch.zeros_like(mask_BT[:, :1]))
        if mask_BT.shape != tokens_BT.shape or not ((changes_BT == 1).sum(1) == 1).all():
            raise ValueError("attention_mask must be 0 only before or after the tokens, and each row must have some")
        if self._goes_on and not mask_BT[:, -1].all():
            raise ValueError("generation needs prompts padded on the left: set tokenizer.padding_side='left'")
        starts_B = changes_BT.argmax(1)
        return [(start, (starts_B == start).nonzero()[:, 0]) for start in sorted(set(starts_B.tolist()))]


class RevDEQForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A language model with the interface of `transformers`.

    Rows padded on the left are solved apart, those of equal length together, so that padding changes nothing.
    """

    config_class = RevDEQConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_default_dynamic_cache = classmethod(lambda cls: False)
    register_for_auto_class = classmethod(lambda cls, auto_class=None: None)

    def __init__(self, config: RevDEQConfig) -> None:
        super().__init__(config)
        with torch.device("cpu"):  # where the library makes models without values, buffers need theirs
            self.model = build_language_model(TransformerConfig(**config.network), SolverConfig(**config.solver))
        self._buffers_of = [
            (module, name, module.get_buffer(name).clone())
            for module in self.model.modules()
            for name in module._non_persistent_buffers_set
        ]
        self._set_steps()
        self.post_init()

    def _set_steps(self) -> None:
        layer, steps = getattr(self.model, "equilibrium", None), self.config.max_steps
        if layer is None and steps is not None:
            raise ValueError(f"a model without solver has no solver steps, got max_steps={steps}: remove it")
        if layer is not None and layer.solver.max_steps != steps:
            layer.solver = replace(layer.solver, max_steps=steps)

    @override
    def _init_weights(self, module: nn.Module) -> None:
        """Restore the buffers that no file has; weights are initialized when they are made."""
        for owner, name, value in self._buffers_of:
            if owner is module:
                setattr(owner, name, value.to(owner.get_buffer(name).device))

    def get_input_embeddings(self) -> Any:
        return self.model.embedding.token

    def get_output_embeddings(self) -> Any:
        return self.model.head

    @override
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write weights, settings, and the file that imports this class."""
        super().save_pretrained(save_directory, *args, **kwargs)
        Path(save_directory, f"{_MODULE}.py").write_text(_CODE, encoding="utf-8")

    @override
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: PromptCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> Any:
        """Logits, and the loss if there are labels (those of the inputs, shifted here), as in all of `transformers`."""
        if refused := [name for name, value in others.items() if value is not None and value is not False]:
            raise ValueError(f"RevDEQForCausalLM takes no {', '.join(refused)}: remove it")
        if cache is not None and not isinstance(cache, PromptCache):
            raise ValueError(f"the cache must be one that this model returned, got {type(cache).__name__}: remove it")
        self._set_steps()
        goes_on = bool(use_cache) or cache is not None
        cache = PromptCache(self.model, goes_on) if cache is None else cache
        h_BTD = cache.read(input_ids, attention_mask)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.model.head(h_BTD[:, kept])
        if goes_on:
            settle_checks()  # a GPU could not draw from NaN
        loss = None
        if labels is not None:
            size = self.model.config.vocab_size
            loss = self.loss_function(logits_BTV, labels, size, num_items_in_batch=num_items_in_batch)
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BTV, cache=cache if goes_on else None)
        return output.to_tuple() if return_dict is False else output


# Where this module is imported, folders load without `trust_remote_code`.
AutoConfig.register(RevDEQConfig.model_type, RevDEQConfig)
AutoModelForCausalLM.register(RevDEQConfig, RevDEQForCausalLM)
