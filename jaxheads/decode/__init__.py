"""Generation with edits, and caches that keep a part of the context."""

from jaxheads.decode.chunk_cache import ChunkCache
from jaxheads.decode.contrast import Contrasted, DoLa
from jaxheads.decode.generate import Generated, generate
from jaxheads.decode.head_cache import HeadCache
from jaxheads.decode.kept import KeptCache, compress
from jaxheads.decode.kinds import HeadKinds
from jaxheads.decode.policies import Chunks, Full, HeadWise, Policy, Selected
from jaxheads.decode.reading import Read
from jaxheads.decode.sampling import Sampler
from jaxheads.decode.state import State, advance, start

__all__ = [
    "ChunkCache",
    "Chunks",
    "Contrasted",
    "DoLa",
    "Full",
    "Generated",
    "HeadCache",
    "HeadKinds",
    "HeadWise",
    "KeptCache",
    "Policy",
    "Read",
    "Sampler",
    "Selected",
    "State",
    "advance",
    "compress",
    "generate",
    "start",
]
