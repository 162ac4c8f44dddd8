"""Generation with edits."""

from jaxheads.decode.generate import Generated, generate
from jaxheads.decode.sampling import Sampler
from jaxheads.decode.state import State, advance, start

__all__ = ["Generated", "Sampler", "State", "advance", "generate", "start"]
