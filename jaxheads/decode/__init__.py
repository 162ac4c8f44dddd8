"""Generation with edits."""

from jaxheads.decode.generate import Generated, generate

__all__ = ["Generated", "generate"]
