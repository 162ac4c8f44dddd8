"""The tokens that a tokenizer puts around every text."""

from __future__ import annotations

import tokenizers
from tokenizers import processors


def frame(backend: tokenizers.Tokenizer, first: str | None, last: str | None) -> None:
    """Makes the tokenizer put one token before every text and one after; None for neither."""
    around = [token for token in (first, last) if token is not None]
    template = [token for token in (first, "$A", last) if token is not None]
    backend.post_processor = processors.TemplateProcessing(
        single=template,
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(around)],
    )
