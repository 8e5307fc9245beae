"""Text: sources, tokenizers, windows of tokens, and their data module."""
