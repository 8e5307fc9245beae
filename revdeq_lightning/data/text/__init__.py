"""Text: sources, tokenizers, windows of tokens, and their data module."""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from revdeq_lightning.data.text.module import SplitStatistics as SplitStatistics, TextDataModule as TextDataModule
    from revdeq_lightning.data.text.tokenizers import (
        AbstractTokenizer as AbstractTokenizer,
        BytePairTokenizer as BytePairTokenizer,
        ByteTokenizer as ByteTokenizer,
        CharacterTokenizer as CharacterTokenizer,
        tokenizer_from_state as tokenizer_from_state,
    )
    from revdeq_lightning.data.text.windows import TextBatch as TextBatch

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
