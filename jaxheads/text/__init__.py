"""Text in and out: tokenizers and chat templates."""

from jaxheads.text.sample import sample_text
from jaxheads.text.tokenizer import Tokenizer

__all__ = ["Tokenizer", "sample_text"]
