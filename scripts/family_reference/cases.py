"""Every case, in order."""

from __future__ import annotations

from family_reference.decoders import DECODERS
from family_reference.encoders import ENCODERS
from family_reference.images import IMAGES
from family_reference.pairs import PAIRS

CASES = (*DECODERS, *ENCODERS, *PAIRS, *IMAGES)
