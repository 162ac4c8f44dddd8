"""Tiny models and unions of experts of them, shared by the tests."""

import jax
import jax.numpy as jnp
from tiny import tiny_model

from jaxheads.edits import Edits
from jaxheads.methods.union_of_experts import Selection, union_of_experts

F = 60
"""Hidden width of the models: 6 experts of heads, of neurons too."""
ATTENTION, MLP = Selection(6, top_k=3), Selection(4, top_k=2)
CHOOSING = Selection(6, capacity=0.55)


def model_of(kind="mha", *, causal=True):
    return tiny_model(kind, biases=True, d_mlp=F, causal=causal)


def union(model, attention=ATTENTION, mlp=MLP, *, size=30.0, **options) -> Edits:
    """A union whose routers are far from even: gates differ much between experts."""
    edits = union_of_experts(
        model.config, jax.random.key(5), attention=attention, mlp=mlp, **options
    )
    return with_gating(edits, size)


def with_gating(edits: Edits, factor: float) -> Edits:
    """The routers' weights times a factor."""
    return jax.tree.map(lambda x: x * factor if x.dtype == jnp.float32 else x, edits)
