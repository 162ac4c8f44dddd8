"""An edit of a head means the same in every family: identities T1-T3, T8, T9 on each of them.

T4-T6 need no family of their own: T5 is `Mix`, T6 is checked with the families' reference values.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, mostly_slow

import jaxheads as jh
from jaxheads.convert.load import load_model
from jaxheads.model.models import build
from jaxheads.model.parameters import flatten, nest
from jaxheads.sites import COMPUTED_IF_ASKED, CROSS_SITES, SITES, axis_sizes

SHORT = 11
ASKED = {f"{p}{site}" for site in COMPUTED_IF_ASKED for p in ("", "cross.")} - {
    "head_out", "cross.head_out"
}  # fmt: skip
ONE_OF_EACH = sorted({families.reference(case).family: case for case in families.cases()}.values())


@dataclasses.dataclass
class Attention:
    """One kind of attention of a model, and how to run the model with edits of it."""

    name: str
    path: str
    config: Any
    model: Any
    run: Callable[..., dict[str, jax.Array]]

    def tap(self, site: str) -> str:
        return f"{self.name}{site}"

    def edits(self, **by_site: Any) -> jh.Edits:
        return jh.Edits({self.tap(site): edit for site, edit in by_site.items()})


def attentions(case: str, folder) -> list[Attention]:
    """Every kind of attention of a case: its own, of an encoder, across, of each tower."""
    model = load_model(families.materialise(case, folder))
    given = families.reference(case).inputs
    tokens = {name: array[:, -SHORT:] for name, array in given.items() if name.endswith("tokens")}

    def call(model: Any, arguments: tuple, taps: tuple[str, ...], edits: Any) -> dict[str, Any]:
        return model(*arguments, taps=taps, edits=edits).taps

    if hasattr(model, "decoder"):
        arguments = (tokens["source_tokens"], tokens["target_tokens"])
        sides = model.config
        return [
            Attention(
                "encoder.", "encoder/blocks/attn", sides.encoder, model, bind(call, arguments)
            ),
            Attention("", "decoder/blocks/attn", sides.decoder, model, bind(call, arguments)),
            Attention(
                "cross.", "decoder/blocks/cross", sides.decoder, model, bind(call, arguments)
            ),
        ]
    if hasattr(model, "vision"):
        towers = {"text": tokens.get("tokens"), "vision": given["pixels"]}
        return [
            Attention("", "blocks/attn", tower.config, tower, bind(call, (towers[name],)))
            for name, tower in (("text", model.text), ("vision", model.vision))
        ]
    arguments = (given["pixels"] if "pixels" in given else tokens["tokens"],)
    return [Attention("", "blocks/attn", model.config, model, bind(call, arguments))]


def bind(call: Callable[..., Any], arguments: tuple) -> Callable[..., Any]:
    return lambda model, taps, edits=None: call(model, arguments, taps, edits)


def with_leaf(model: Any, path: str, change: Callable[[jax.Array], jax.Array]) -> Any:
    leaves = dict(flatten(model.params))
    return build(model.config, nest(leaves | {path: change(leaves[path])}))


@pytest.mark.parametrize("case", mostly_slow(ONE_OF_EACH, *ONE_OF_EACH[::4]))
def test_an_edit_of_a_head_means_the_same(case, tmp_path):
    for attention in attentions(case, tmp_path):
        check_attention(attention)


def check_attention(attention: Attention) -> None:
    model, config, rng = attention.model, attention.config, np.random.default_rng(0)
    layers, heads, size = config.n_layers, config.n_heads, config.head_dim
    sites = ("z", "attn_out", "pattern")
    taps = tuple(attention.tap(site) for site in sites)

    def run(model: Any, edits: Any = None) -> list[jax.Array]:
        found = attention.run(model, taps, edits)
        return [found[tap] for tap in taps]

    # One structure of edits, and so one program, serves every identity.
    ones, zeros = np.ones((layers, 1, 1, heads, 1)), np.zeros((layers, 1, 1, heads, size))
    basis = np.zeros((layers, 1, 1, heads, config.d_model, 1), np.float32)
    z, out, _ = run(model)

    def edited(scale=ones, offset=zeros, value=z, weight=0 * ones, q=ones, basis=basis):
        f32 = [jnp.asarray(x, jnp.float32) for x in (scale, offset, value, weight, q)]
        edits = attention.edits(
            q=jh.Affine(f32[4]),
            z=jh.Chain((jh.Affine(f32[0], f32[1]), jh.Mix(f32[2], f32[3]))),
            head_out=jh.Project(jnp.asarray(basis)),
        )
        return run(model, edits)

    for ours, neutral in zip(edited(), (z, out), strict=False):
        close(ours, neutral)

    # T1: scaling z is scaling the output projection.
    scale = rng.normal(size=(layers, heads)).astype(np.float32)
    scaled = with_leaf(model, f"{attention.path}/o", lambda o: o * scale[:, :, None, None])
    first = edited(scale=scale[:, None, None, :, None])[1]
    close(first, run(scaled)[1])
    assert np.abs(first - out).max() > 1e-2

    # T2: zero queries attend uniformly to what they see (if nothing else speaks of places).
    plain = run(model)[2]
    seen = np.asarray(plain) > 0
    uniform = seen / seen.sum(-1, keepdims=True)
    if config.relative_buckets and attention.name != "cross.":
        masked = jh.mask_heads(config, [(0, 1)], "uniform")
        edits = masked.under("encoder") if attention.name else masked
        close(run(model, edits)[2][0][:, 1], uniform[0][:, 1])
    else:
        close(edited(q=0 * ones)[2], uniform)

    # T3 and T9: an offset of z, and a direction removed from a head's write, are weights.
    offset = rng.normal(size=(layers, 1, 1, heads, size)).astype(np.float32)
    direction = rng.normal(size=basis.shape).astype(np.float32)
    direction /= np.linalg.norm(direction, axis=-2, keepdims=True)
    last = edited(offset=offset, basis=direction)[1]
    folded = jh.fold(
        model,
        attention.edits(z=jh.Affine(offset=offset), head_out=jh.Project(jnp.asarray(direction))),
    )
    close(run(folded)[1], last)

    # T8: with every z of another run, attention writes what it wrote there.
    close(edited(value=z[:, ::-1], weight=ones)[1][0], out[0, ::-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["gpt2", "gpt_neox", "bert", "olmo2", "gemma2", "dinov2", "t5", "bart"]
)
def test_every_site_folds_exactly_or_is_refused(case, tmp_path):
    """An affine edit of each site with values of its own: no third way."""
    folds = 0
    for attention in attentions(case, tmp_path):
        model, config, rng = attention.model, attention.config, np.random.default_rng(0)
        others = (CROSS_SITES if attention.name == "cross." else SITES).values()
        for site in [s for s in others if s.stacked and s.name not in ASKED]:
            bare = site.name.removeprefix("cross.")
            tap = attention.tap(bare)
            shape = [config.n_layers, 1, 1] + [axis_sizes(config)[a] for a in site.axes[2:]]
            scale = 1 + 0.3 * rng.normal(size=shape).astype(np.float32)
            offset = 0.3 * rng.normal(size=shape).astype(np.float32)
            last = "final" if attention.name != "encoder." else "encoder.final"
            for edit in (jh.Affine(scale, offset), jh.Affine(offset=offset)):
                edits = jh.Edits({tap: edit})
                try:
                    folded = jh.fold(model, edits)
                except ValueError as error:
                    assert "cannot be folded" in str(error)
                    continue
                folds += 1
                expected = attention.run(model, (last,), edits)[last]
                found = attention.run(folded, (last,))[last]
                gap = jnp.abs(found - expected).max() / jnp.abs(expected).max()
                assert gap < 1e-4, (tap, gap)
    assert folds > 5
