"""Routing that computes the chosen heads only gives what masking all heads gives."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import on_eight_devices
from flax import struct
from tiny import close, mostly_slow, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.data import ArrayRows
from jaxheads.edits import Edits, LowRank, mixture_of_heads
from jaxheads.model.chosen import Logits, attend_chosen, count_blocks, plan_blocks
from jaxheads.model.context import Tap
from jaxheads.routing import routing_taps
from jaxheads.train import Fit, Job, Mesh, Optimizer, make_mesh
from jaxheads.train.hlo import read_program
from jaxheads.train.losses import language_loss

BLOCK, ROWS, LENGTH = 4, 3, 14
MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"kind": "mha", "biases": True},
    "mqa": {"kind": "mqa"},
    "windows": {"windows": (0, 3, 5)},
    "encoder": {"causal": False},
    "relative": {"relative_buckets": 8, "relative_distance": 6, "attn_scale": 1.0},
    "capped": {"attn_softcap": 2.0, "qk_norm": "head"},
}
CASES = [(name, "padded") for name in MODELS] + [("gqa", "plain"), ("gqa", "packed")]


def batch_of(kind: str) -> jh.Batch:
    tokens, mask = tiny_tokens(ROWS, LENGTH).astype(np.int32), np.ones((ROWS, LENGTH), bool)
    if kind == "plain":
        return jh.Batch(tokens, mask)
    if kind == "padded":
        mask[0, :5] = False
        mask[1, 9:] = False
        return jh.Batch(tokens, mask)
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[:2, 6:] = 2
    segments[1, 11:] = 0
    return jh.Batch(tokens, segments > 0, None, segments)


def route_of(model: jh.Transformer, top_k: Any = (1, 2, 3), seed: int = 3, **forms: str) -> Any:
    """Two shared heads, no weight of zero."""
    key = jax.random.key(seed)
    route: Any = mixture_of_heads(model.config, key, shared=2, top_k=top_k, **forms)["z"]
    drawn = {n: 0.5 * jax.random.normal(key, w.shape) for n, w in route.weights.items()}
    return route.with_weights(drawn)


@jax.jit
def logits(model: jh.Transformer, batch: jh.Batch, edits: Any) -> jax.Array:
    return model(batch, edits=edits).logits


def task_loss(model: jh.Transformer, edits: Any, batch: jh.Batch) -> jax.Array:
    return language_loss(model, batch, edits=edits)[0]


@jax.jit
def gradients(model: jh.Transformer, route: Any, batch: jh.Batch) -> Any:
    """Of the parameters and of the router's weights."""

    def loss(params: Any, weights: Any) -> jax.Array:
        edits = Edits(z=route.with_weights(weights))
        return task_loss(jh.Transformer(model.config, params), edits, batch)

    return jax.grad(loss, (0, 1))(model.params, route.weights)


@pytest.mark.parametrize("case", mostly_slow(CASES, *CASES[:1], *CASES[5:6], CASES[-1]))
def test_it_equals_the_masked_form(case):
    model, batch = tiny_model(**MODELS[case[0]]), batch_of(case[1])
    route = route_of(model)
    masked = logits(model, batch, Edits(z=route))
    found = logits(model, batch, Edits(z=route.skipping(BLOCK)))
    close(found[batch.mask], masked[batch.mask])
    # And the router changes something.
    assert np.abs(masked - logits(model, batch, Edits()))[batch.mask].max() > 0.1


@pytest.mark.parametrize("block", mostly_slow([1, 3, 5, 13, 14, 200], 5))
def test_any_block_gives_the_same(block):
    model, batch = tiny_model(), batch_of("padded")
    route = route_of(model)
    found, masked = (logits(model, batch, Edits(z=r)) for r in (route.skipping(block), route))
    close(found[batch.mask], masked[batch.mask])


def test_all_heads_with_gates_of_one_are_dense_attention():
    model, batch = tiny_model(), batch_of("padded")
    forms = {"gates": "straight_through", "scores": "query_norm"}
    route = route_of(model, top_k=4, **forms).skipping(BLOCK)
    found, dense = (logits(model, batch, e) for e in (Edits(z=route), Edits()))
    close(found[batch.mask], dense[batch.mask])


GRADIENTS = [("gqa", "renormalised"), ("relative", "two_stage"), ("mha", "two_stage")]


@pytest.mark.parametrize("case", mostly_slow(GRADIENTS, *GRADIENTS[:2]))
def test_gradients_are_those_of_the_masked_form(case):
    model, batch = tiny_model(**MODELS[case[0]]), batch_of("padded")
    route = route_of(model, gates=case[1])
    masked = gradients(model, route, batch)
    found = gradients(model, route.skipping(BLOCK), batch)
    for one, other in zip(*map(jax.tree.leaves, (found, masked)), strict=True):
        close(one, other)
        assert np.abs(other).max() > 0
    # The router's own, with the tolerance relative to each.
    for name, leaf in masked[1].items():
        scale = 1 / np.abs(leaf).max()
        close(scale * found[1][name], scale * leaf, 1e-4)


@pytest.mark.slow
def test_gradients_do_not_depend_on_what_blocks_keep():
    model, batch = tiny_model(), batch_of("packed")
    route = route_of(model).skipping(BLOCK)

    def loss(params, remat):
        whole = jh.Transformer(model.config, params)
        out = whole(batch, edits=Edits(z=route), remat=remat)
        return jnp.sum(jnp.where(batch.mask[..., None], jnp.sin(out.logits), 0))

    expected = jax.grad(loss)(model.params, "none")
    for remat in ("dots", "full"):
        chex.assert_trees_all_close(jax.grad(loss)(model.params, remat), expected, atol=1e-4)


@struct.dataclass
class Kept:
    """A Route whose gates of heads that were not chosen are constants."""

    route: Any

    def __call__(self, value, context):
        decided = self.route.routing(context)
        fixed = jax.lax.stop_gradient(decided.gates)
        return value * jnp.where(decided.chosen, decided.gates, fixed)[..., None]


@pytest.mark.slow
def test_straight_through_gradients_leave_out_heads_that_were_not_chosen():
    model, batch = tiny_model(), batch_of("padded")
    route = route_of(model, gates="straight_through")

    def run(kind):
        def loss(router):
            made = dataclasses.replace(route, router=router)
            edits = {"masked": made, "kept": Kept(made), "found": made.skipping(BLOCK)}
            return task_loss(model, Edits(z=edits[kind]), batch)

        return jax.jit(jax.value_and_grad(loss))(route.router)

    masked, kept, found = (run(kind) for kind in ("masked", "kept", "found"))
    close(found[0], masked[0])
    scale = np.abs(kept[1]).max()
    close(found[1] / scale, kept[1] / scale, 1e-4)
    # That part is not small.
    assert np.abs(masked[1] - kept[1]).max() > 0.1 * scale


def test_one_program_serves_every_router():
    model, batch = tiny_model(), batch_of("padded")

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(edits):
        return model(batch, edits=edits).logits

    outs = []
    for seed, top_k in enumerate([(1, 2, 3), (3, 1, 1), (3, 3, 3)]):
        route = route_of(model, top_k, seed)
        outs.append(run(Edits(z=route.skipping(BLOCK))))
        close(outs[-1][batch.mask], logits(model, batch, Edits(z=route))[batch.mask])
    assert np.abs(outs[0] - outs[1])[batch.mask].max() > 0.1


@pytest.mark.slow
def test_routers_can_be_stacked():
    model, batch = tiny_model(), batch_of("plain")
    edits = [Edits(z=route_of(model, 2, seed).skipping(BLOCK)) for seed in range(2)]
    found = jax.jit(jax.vmap(lambda e: model(batch, edits=e).logits))(Edits.stack(edits))
    for one, edit in zip(found, edits, strict=True):
        close(one, logits(model, batch, edit))


def test_statistics_of_routing_are_the_same():
    model, batch = tiny_model(), batch_of("padded")
    route = route_of(model)
    run = jax.jit(lambda e: model(batch, edits=e, taps=routing_taps()).taps["routing"])
    found, masked = (run(Edits(z=r)) for r in (route.skipping(BLOCK), route))
    chex.assert_trees_all_close(found, masked, rtol=1e-4)


def test_decoding_after_a_long_prompt_goes_on_in_the_masked_form():
    model, tokens = tiny_model(), tiny_tokens(2, LENGTH)
    edits = Edits(z=route_of(model).skipping(BLOCK))
    whole = model(tokens, edits=edits).logits
    out = model(tokens[:, :-2], edits=edits, cache=jh.model.empty_cache(model.config, 2, LENGTH))
    for slot in (-2, -1):
        token = tokens[:, slot : slot + 1 or None]
        out = model(token, edits=edits, cache=out.cache, phase="decode")
        close(out.logits[:, 0], whole[:, slot])


def test_bfloat16_runs_as_the_masked_form_does():
    model, batch = tiny_model().astype("bfloat16"), batch_of("padded")
    route = route_of(model)
    found, masked = (logits(model, batch, Edits(z=r)) for r in (route.skipping(BLOCK), route))
    close(found[batch.mask], masked[batch.mask], 0.03)
    assert np.isfinite(found).all()


def test_it_is_saved_and_loaded(tmp_path):
    model, batch = tiny_model(), batch_of("plain")
    edits = Edits(z=route_of(model).skipping(BLOCK))
    edits.save(tmp_path / "route.safetensors")
    loaded = Edits.load(tmp_path / "route.safetensors")
    assert jax.tree.structure(loaded) == jax.tree.structure(edits)
    np.testing.assert_array_equal(logits(model, batch, loaded), logits(model, batch, edits))


# The function on arrays.


def arrays(t: int = 11, s: int = 9, seed: int = 0) -> dict[str, Any]:
    """6 heads, of which a token chooses at most 3; 2 of keys and values."""
    random = np.random.default_rng(seed)
    chosen = random.random((2, t, 6)).argsort(-1) < 3
    chosen[1, 4] = False
    gates = np.where(chosen, random.random(chosen.shape), 0)
    normal = {"q": (2, t, 6, 8), "k": (2, s, 2, 8), "v": (2, s, 2, 8), "weight": (6, 8, 10)}
    found = {name: random.normal(size=shape) for name, shape in normal.items()}
    allowed = random.random((2, 1, 1, s)) < 0.7
    allowed[..., 0] = True
    found |= {"chosen": chosen, "gates": gates, "allowed": allowed}
    return {n: jnp.asarray(x, bool if x.dtype == bool else "float32") for n, x in found.items()}


def by_hand(q, k, v, weight, chosen, gates, allowed, scale) -> np.ndarray:
    q, k, v, weight, gates, allowed = (np.asarray(x) for x in (q, k, v, weight, gates, allowed))
    out = np.zeros((*q.shape[:2], weight.shape[-1]))
    for b, t, h in np.argwhere(np.asarray(chosen)):
        scores = k[b, :, h // 3] @ q[b, t, h] * scale
        weights = np.where(allowed[b, 0, 0], np.exp(scores), 0)
        out[b, t] += gates[b, t, h] * (weights / weights.sum()) @ v[b, :, h // 3] @ weight[h]
    return out


def test_keys_may_be_others_than_the_queries_tokens():
    given = arrays()
    found = attend_chosen(**given, block=4, most=3, logits=Logits(0.3))
    close(found, by_hand(**given, scale=0.3))
    np.testing.assert_array_equal(found[1, 4], 0)


def test_every_pair_has_one_slot():
    chosen = np.asarray(arrays(t=23)["chosen"])
    blocks = jax.tree.map(np.asarray, plan_blocks(jnp.asarray(chosen), 4, 3))
    n = len(blocks.head)
    assert n == min(6 * 6, (23 * 3 + 6 * 3) // 4)
    for row in range(2):
        heads, tokens = np.repeat(blocks.head[:, row], 4), blocks.token[:, row].ravel()
        pairs = [(t, h) for t, h in zip(tokens, heads, strict=True) if t < 23]
        assert sorted(pairs) == [tuple(pair) for pair in np.argwhere(chosen[row])]
        for t, h in pairs:
            slot = blocks.slot[row, t, h]
            assert (tokens[slot], heads[slot]) == (t, h)
    assert (blocks.slot[~chosen] == 4 * n).all()
    per_row = (-(-chosen.sum(1) // 4)).sum(-1)
    np.testing.assert_array_equal(blocks.used, np.arange(n) < per_row.max())


def test_a_token_that_chose_too_many_heads_is_nan_and_no_other_one_suffers():
    given = arrays()
    expected = np.array(attend_chosen(**given, block=4, most=3))
    given["chosen"] = given["chosen"].at[0, 5].set(True)
    expected[0, 5] = np.nan
    np.testing.assert_array_equal(attend_chosen(**given, block=4, most=3), expected)


def test_operations_are_those_of_the_chosen_heads():
    def flops(most: int, block: int) -> int:
        given = arrays(t=64, s=64)
        lowered = jax.jit(lambda x: attend_chosen(**x, block=block, most=most)).lower(given)
        return read_program(lowered.compile().as_text()).flops()

    for most, block in ((2, 4), (3, 4), (3, 16)):
        blocks = count_blocks(64, 6, most, block)
        assert flops(most, block) == 2 * blocks * block * (4 * 64 * 8 + 2 * 8 * 10)


# What is refused.


@pytest.mark.parametrize("site", ["z", "head_out", "scores", "pattern"])
def test_what_is_not_computed_cannot_be_tapped(site):
    model = tiny_model()
    edits = Edits(z=route_of(model).skipping(BLOCK))
    with pytest.raises(ValueError, match=f"the tap '{site}' needs '{site}', which is not comput"):
        model(tiny_tokens(), edits=edits, taps=site)
    # A sequence of one block is computed in the masked form.
    assert site in model(tiny_tokens(length=BLOCK), edits=edits, taps=site).taps


def reads_z(config):
    size = (config.n_layers, config.n_heads, config.head_dim, 2)
    down, up = jnp.ones(size), jnp.ones((config.n_layers, 2, config.d_model))
    return LowRank(down, up, source="z")


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (lambda c, z: Edits(z=z) | jh.attend_to(c, [(0, 1)], "self"), "the edit of 'pattern'"),
        (lambda c, z: Edits(z=z) | Edits.identity(c, "head_out"), "the edit of 'head_out'"),
        (lambda c, z: Edits(z=z, attn_out=reads_z(c)), "the edit of 'attn_out' needs 'z'"),
        (lambda c, z: Edits(z=z) | jh.mask_heads(c, [(0, 1)]), "must be the only edit of its si"),
        (lambda c, z: jh.mask_heads(c, [(0, 1)]) | Edits(z=z), "must be the only edit of its si"),
        (lambda c, z: Edits(z=z).when("prefill"), "must be the only edit of its site"),
    ],
    ids=["pattern", "head_out", "needs", "chain", "chained", "gated"],
)
def test_other_edits_of_what_is_not_computed_are_refused(edits, message):
    model = tiny_model()
    edits = edits(model.config, route_of(model).skipping(BLOCK))
    with pytest.raises(ValueError, match=message):
        model(tiny_tokens(), edits=edits)


def test_edits_elsewhere_are_not():
    model, batch = tiny_model(), batch_of("plain")
    others = jh.mask_heads(model.config, [(1, 2)], "uniform") | Edits.identity(
        model.config, "attn_out", offset=True
    )
    route = route_of(model)
    found, masked = (
        logits(model, batch, others | Edits(z=r)) for r in (route.skipping(BLOCK), route)
    )
    close(found, masked)


def test_blocks_and_heads_must_be_known():
    route = route_of(tiny_model())
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        route.skipping(0)
    with pytest.raises(ValueError, match=r"call it\s+outside of jit"):
        jax.jit(lambda route: route.skipping().top_k)(route)


@pytest.mark.slow
def test_smollm2(smollm2):
    model, _ = smollm2
    tokens = np.random.default_rng(0).integers(0, 49152, (1, 512))
    forms = {"gates": "straight_through", "scores": "query_norm"}
    route: Any = mixture_of_heads(model.config, shared=3, share=0.5, **forms)["z"]
    # Summed head by head too: the order of that sum alone moves logits by 5e-3 after 30 layers.
    taps = {"none": Tap("head_out", lambda value, context: jnp.sum(value))}
    masked = model(tokens, edits=Edits(z=route), taps=taps).logits
    close(model(tokens, edits=Edits(z=route.skipping(64))).logits, masked)


# Divided over 8 fake devices, in a process of their own that runs this file as a script.

MESHES: dict[str, Any] = {
    "data": {},
    "tensor": {"tensor": 2},
    "fsdp": {"fsdp": 4},
    "auto": {"mode": "auto"},
    "auto, tensor": {"fsdp": 2, "tensor": 2, "mode": "auto"},
    "sequence": {"sequence": 2},
}
REFUSED = {"tensor": "heads are divided over tensor", "sequence": "tokens are divided over seq"}


def routed_loss(trainable: Any, frozen: Any, batch: jh.Batch, key: Any) -> Any:
    route = frozen["z"].with_weights(trainable["edits"]["z"])
    model = jh.Transformer(tiny_divided().config, trainable["params"])
    return language_loss(model, batch, edits=Edits(z=route))


def tiny_divided() -> jh.Transformer:
    return tiny_model("gqa", n_heads=8, n_kv_heads=4, d_model=32, d_mlp=512, vocab_size=128)


def train(mesh: Any) -> tuple[list[float], dict[str, np.ndarray]]:
    model = tiny_divided()
    route = route_of(model).skipping(BLOCK)
    tokens = tiny_tokens(16, LENGTH).astype(np.int32)
    mask = np.ones(tokens.shape, bool)
    mask[::3, 9:] = False
    losses: list[float] = []
    job = Job(mesh=mesh, on_step=lambda report: losses.append(report.metrics["loss"]))
    optimizer = Optimizer(learning_rate=1e-2, clip=1.0, eps=1e-3)
    fit = Fit(steps=2, batch_size=16, optimizer=optimizer)
    trainable = {"params": model.params, "edits": {"z": route.weights}}
    fixed = route.without_weights()
    rows = ArrayRows(jh.Batch(tokens, mask))
    trained = job.fit("routed", routed_loss, trainable, {"z": fixed}, rows, fit)
    leaves = jax.tree_util.tree_leaves_with_path(trained)
    return losses, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def compare(meshes: dict[str, Any]) -> dict[str, Any]:
    """For each mesh the losses, and the largest differences from one device, or the refusal."""
    losses, leaves = train(None)
    found: dict[str, Any] = {}
    for name, sizes in meshes.items():
        try:
            divided, others = train(make_mesh(Mesh(**sizes)))
        except ValueError as error:
            found[name] = {"error": str(error)}
            continue
        far = {path: float(np.abs(leaf - others[path]).max()) for path, leaf in leaves.items()}
        found[name] = {"losses": [losses, divided], "far": far}
    return found


@pytest.mark.slow
def test_divided_rows_give_what_one_device_gives_and_divided_heads_are_refused():
    for name, found in on_eight_devices(compare, MESHES).items():
        if name in REFUSED:
            assert REFUSED[name] in found["error"]
            continue
        assert "error" not in found, (name, found)
        np.testing.assert_allclose(*found["losses"], rtol=1e-5)
        for path, far in found["far"].items():
            assert far < 1e-5, (name, path)
