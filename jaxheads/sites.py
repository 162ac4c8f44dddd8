"""The site table: every place of the transformer that can be edited or tapped.

Axes: B batch, T query positions, S key positions, H query heads, K key/value
heads (H = K * G), Dh head size, D model width, F MLP width, V vocabulary. Sites of
the block stack carry a leading layer axis L in taps and in the leaves of edits.
Names are TransformerLens's, in snake case.

Attention to an encoder's output has the same sites under "cross.". In a model of two
stacks, the sites of the encoder are those of the table under "encoder.".
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxheads.names import choose

if TYPE_CHECKING:
    from jaxheads.model.config import ModelConfig


@dataclass(frozen=True)
class Site:
    """One place of the computation.

    Attributes:
      name: the name used by edits and taps.
      axes: the axes of the value within one layer, e.g. ("B", "T", "H", "Dh").
      stacked: whether the site is inside the block stack, one value per layer.
      meaning: one line for people.
    """

    name: str
    axes: tuple[str, ...]
    stacked: bool
    meaning: str

    @property
    def head_axis(self) -> str | None:
        """The axis "H" or "K" of a site with one value per head, else None."""
        return next((axis for axis in self.axes if axis in ("H", "K")), None)

    @property
    def signature(self) -> str:
        """The axes as written in docs, e.g. "[L,B,T,H,Dh]"."""
        return f"[{','.join(('L',) * self.stacked + self.axes)}]"


_STREAM = ("B", "T", "D")

SITES: Mapping[str, Site] = {
    site.name: site
    # In the order in which one forward pass computes them.
    for site in (
        Site("embed", _STREAM, False, "token embeddings entering the first block"),
        Site("resid_pre", _STREAM, True, "residual stream before attention"),
        Site("attn_in", _STREAM, True, "normalised input of attention"),
        Site("q_pre", ("B", "T", "H", "Dh"), True, "queries before qk-norm and position encoding"),
        Site("k_pre", ("B", "T", "K", "Dh"), True, "keys before qk-norm and position encoding"),
        Site("q", ("B", "T", "H", "Dh"), True, "queries after position encoding"),
        Site("k", ("B", "T", "K", "Dh"), True, "keys after position encoding"),
        Site("v", ("B", "T", "K", "Dh"), True, "values"),
        Site("scores", ("B", "H", "T", "S"), True, "attention logits after mask and scale"),
        Site("pattern", ("B", "H", "T", "S"), True, "attention weights after softmax"),
        Site("z", ("B", "T", "H", "Dh"), True, "each head's output before the output projection"),
        Site("head_out", ("B", "T", "H", "D"), True, "each head's write to the residual stream"),
        Site("attn_out", _STREAM, True, "what attention adds to the residual stream"),
        Site("resid_mid", _STREAM, True, "residual stream between attention and MLP"),
        Site("mlp_in", _STREAM, True, "normalised input of the MLP"),
        Site("neurons", ("B", "T", "F"), True, "MLP hidden activation, after any gate product"),
        Site("mlp_out", _STREAM, True, "what the MLP adds to the residual stream"),
        Site("resid_post", _STREAM, True, "residual stream after the MLP"),
        Site("final", _STREAM, False, "normalised output of the stack, before unembedding"),
        Site("logits", ("B", "T", "V"), False, "next-token logits"),
    )
}

CROSS_SITES: Mapping[str, Site] = {
    site.name: site
    # In the order in which a block computes them, between `attn_out` and `resid_mid`.
    for site in (
        Site("cross.resid_pre", _STREAM, True, "residual stream before cross-attention"),
        Site("cross.attn_in", _STREAM, True, "normalised input of cross-attention"),
        Site("cross.q", ("B", "T", "H", "Dh"), True, "queries of cross-attention"),
        Site("cross.k", ("B", "S", "K", "Dh"), True, "keys of cross-attention"),
        Site("cross.v", ("B", "S", "K", "Dh"), True, "values of cross-attention"),
        Site("cross.scores", ("B", "H", "T", "S"), True, "logits of cross-attention"),
        Site("cross.pattern", ("B", "H", "T", "S"), True, "weights of cross-attention"),
        Site("cross.z", ("B", "T", "H", "Dh"), True, "output of each cross-attention head"),
        Site("cross.head_out", ("B", "T", "H", "D"), True, "write of each cross-attention head"),
        Site("cross.attn_out", _STREAM, True, "what cross-attention adds to the residual stream"),
    )
}
"""The sites of attention to an encoder's output, in models that have it."""

COMPUTED_IF_ASKED = ("scores", "pattern", "head_out")
"""Sites that exist only where somebody edits, taps or needs them; likewise under "cross."."""

ENCODER = "encoder."
"""What the names of an encoder's sites begin with, in a model of two stacks."""


def find_site(name: str) -> Site:
    """The site called `name`.

    Raises:
      ValueError: there is no such site; the message suggests the nearest.
    """
    if name.startswith(ENCODER):
        site = find_site(name.removeprefix(ENCODER))
        return dataclasses.replace(site, name=name)
    known = CROSS_SITES if name.startswith("cross.") else SITES
    return known[choose("site", name, known)]


def axis_sizes(config: "ModelConfig") -> dict[str, int]:
    """Sizes of the axes that the config fixes.

    L, H, K, Dh, D, F, V as above; E is a second model width, P learned positions, Y token
    types, N buckets of relative positions, X learned tokens before an image's patches, W and
    U the sides of a patch and C its colours, Z the size of a projection.
    """
    image = config.image
    return {
        "L": config.n_layers,
        "H": config.n_heads,
        "K": config.n_kv_heads,
        "Dh": config.head_dim,
        "D": config.d_model,
        "E": config.d_model,
        "F": config.d_mlp,
        "V": config.vocab_size,
        "P": config.n_positions,
        "Y": config.n_token_types,
        "N": config.relative_buckets,
        "X": image.prefix if image else 0,
        "W": image.patch if image else 0,
        "U": image.patch if image else 0,
        "C": image.channels if image else 0,
        "Z": config.projection,
    }
