"""Text in and out: tokenizers and chat templates."""

from jaxheads.text.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
