"""Union of Experts, the method: what fits a model, its losses, its training and its cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import on_eight_devices
from tiny import close, tiny_tokens
from tiny_experts import CHOOSING, F, model_of, union

import jaxheads as jh
from jaxheads.data.rows import ArrayRows
from jaxheads.edits.experts import Experts
from jaxheads.methods.from_scratch import Shape
from jaxheads.methods.method import TextData
from jaxheads.methods.union_of_experts import (
    ExpertPenalty,
    Selection,
    UnionOfExperts,
    flops_share,
    union_of_experts,
)
from jaxheads.routing import RoutingPenalty
from jaxheads.train.fit import Fit
from jaxheads.train.job import Job
from jaxheads.train.losses import language_loss
from jaxheads.train.mesh import Mesh, make_mesh
from jaxheads.train.optimizer import Optimizer

# What does not fit is refused.


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("mha", {"attention": Selection(4, top_k=2)}, "must divide n_heads = 6, got 4"),
        ("mha", {"mlp": Selection(7, top_k=2)}, "must divide d_mlp = 60, got 7"),
        ("gqa", {"attention": Selection(3, top_k=2)}, "n_kv_heads = 2 or be a multiple"),
        ("mha", {"attention": Selection(0, top_k=0)}, "got 0"),
        ("mha", {"attention": Selection(6, top_k=7)}, "between 2 and the 6 experts, got 7"),
        ("mha", {"attention": Selection(6, top_k=1)}, "got 1: the gate of a token's only expert"),
        ("mha", {"attention": Selection(6)}, "one of top_k and capacity"),
        ("mha", {"mlp": Selection(6, 2, 0.5)}, "mlp: give one of top_k and capacity"),
        ("mha", {"attention": CHOOSING}, "in a causal model experts cannot choose their tokens"),
        ("mha", {}, "attention, mlp or both"),
    ],
)
def test_what_does_not_fit_a_model_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        union_of_experts(model_of(kind).config, jax.random.key(0), **options)


@pytest.mark.parametrize("capacity", [0.0, -0.5, 1.01, 1e-6, float("nan")])
def test_a_capacity_lies_between_none_and_all(capacity):
    config = model_of(causal=False).config
    with pytest.raises(ValueError, match="capacity must lie in"):
        union_of_experts(config, jax.random.key(0), mlp=Selection(4, capacity=capacity))


# Losses and training.


def test_the_balance_loss_is_k_where_load_is_even_and_more_where_it_is_not():
    model, batch = model_of(), jh.pack(list(tiny_tokens(4)))
    penalty = ExpertPenalty(RoutingPenalty(balance=0.5, z=0.1))
    edits = union(model)
    loss, metrics = jax.jit(
        lambda edits: language_loss(model, batch, edits=edits, penalty=penalty)
    )(edits)
    added = sum(
        0.5 * metrics[f"{b}_balance"] + 0.1 * metrics[f"{b}_router_z"] for b in ("attention", "mlp")
    )
    close(loss, metrics["task_loss"] + added)
    assert metrics["attention_balance"] > 3.1 and metrics["mlp_balance"] > 2.1
    even = jax.jit(lambda edits: language_loss(model, batch, edits=edits, penalty=penalty)[1])(
        union(model, random=True)
    )
    close(even["attention_balance"], 3.0)
    close(even["mlp_balance"], 2.0)


@pytest.mark.slow
def test_training_lowers_the_loss_of_every_variant():
    batch = jh.pack(list(tiny_tokens(8, 10)))
    rows = ArrayRows(batch)
    shape = Shape(n_layers=2, n_heads=4, d_model=16, d_mlp=24, context_length=16)
    fit = Fit(steps=12, batch_size=8, optimizer=Optimizer(learning_rate=0.02))
    method = UnionOfExperts(
        shape=shape, attention=Selection(4, top_k=2), mlp=Selection(4, top_k=2), fit=fit
    )
    model = jh.Transformer.random(shape.config(97), jax.random.key(0))
    tuned = method.train(Job(), model, None, TextData(rows, rows))
    assert list(tuned) == ["uoe", "random", "dense"]
    first = jax.jit(jh.next_token_loss)(model, batch)
    for name, variant in tuned.items():
        after = jh.Transformer(model.config, variant.params)
        assert jax.jit(jh.next_token_loss)(after, batch, edits=variant.edits) < 0.9 * first, name
    size = tuned["dense"].trained
    assert tuned["uoe"].trained == size + 2 * 2 * 16 * 4 and tuned["random"].trained == size
    # The routers moved from where they began.
    begun = union_of_experts(
        model.config,
        jax.random.fold_in(jax.random.key(0), 1),
        attention=method.attention,
        mlp=method.mlp,
    )
    for site in ("z", "neurons"):
        experts = tuned["uoe"].edits[site]
        assert isinstance(experts, Experts)
        assert np.abs(experts.gating - begun[site].gating).max() > 0.01


def test_flops_of_a_selection():
    config = model_of().config
    whole = Selection(6, top_k=6)
    # Of all experts only the routers are added: 2 * 40 * 6 over the products of a block.
    block = 4 * 40 * 48 + 2 * 32 * 48 + 3 * 40 * F
    assert flops_share(config, 32, attention=whole, mlp=whole) == pytest.approx(
        1 + 2 * 40 * 6 / block
    )
    half = Selection(6, top_k=3)
    routed = 0.5 * 4 * 40 * 48 + 0.25 * 2 * 32 * 48 + 0.5 * 3 * 40 * F + 2 * 40 * 6
    assert flops_share(config, 32, attention=half, mlp=half) == pytest.approx(routed / block)
    # Three experts share a key/value head: needed at 7 of 8 tokens.
    grouped = model_of("gqa").config
    block = 2 * 40 * 48 + 2 * 40 * 16 + 2 * 32 * 48 + 3 * 40 * F
    routed = 40 * 48 + 7 / 8 * 2 * 40 * 16 + 0.25 * 2 * 32 * 48 + 0.5 * 3 * 40 * F + 2 * 40 * 6
    assert flops_share(grouped, 32, attention=half, mlp=half) == pytest.approx(routed / block)


def trained(mesh, choosing):
    """Losses of two steps on a mesh, and the routers after them."""
    shape = {"n_layers": 2, "n_heads": 8, "head_dim": 8, "d_model": 32, "d_mlp": 64}
    config = jh.ModelConfig(
        **shape, n_kv_heads=4, vocab_size=2560, context_length=16, causal=not choosing
    )
    selection = Selection(4, capacity=0.5) if choosing else Selection(4, top_k=2)
    edits = union_of_experts(config, jax.random.key(1), attention=selection, mlp=selection)
    tokens = np.random.default_rng(0).integers(0, 2560, (8, 16)).astype(np.int32)
    mask = np.arange(16) < np.arange(9, 17)[:, None]

    def loss(edits, model, batch, key):
        out = model(batch, edits=edits)
        return jnp.mean(jnp.square(out.logits), where=batch.mask[..., None]), {}

    model = jh.Transformer.random(config, jax.random.key(0))
    losses = []
    job = Job(mesh=mesh, on_step=lambda report: losses.append(report.metrics["loss"]))
    optimizer = Optimizer(learning_rate=0.01, eps=1e-3)
    rows, fit = ArrayRows(jh.Batch(tokens, mask)), Fit(steps=2, batch_size=8, optimizer=optimizer)
    found = job.fit("edits", loss, edits, model, rows, fit)
    return losses, [np.asarray(found[site].gating).tolist() for site in ("z", "neurons")]


CASES = {  # the mesh, and whether experts choose
    "sequence": ({"sequence": 2, "tensor": 4}, False),
    "fsdp": ({"fsdp": 2, "tensor": 2}, True),
}


def trained_divided(cases):
    return {
        name: trained(make_mesh(Mesh(**sizes)), choosing)
        for name, (sizes, choosing) in cases.items()
    }


@pytest.mark.slow
def test_divided_over_eight_devices_it_is_the_same():
    found = on_eight_devices(trained_divided, CASES)
    for name, (_, choosing) in CASES.items():
        whole, (losses, gating) = trained(None, choosing), found[name]
        np.testing.assert_allclose(losses, whole[0], rtol=1e-5, err_msg=name)
        for mine, theirs in zip(gating, whole[1], strict=True):
            close(mine, theirs)
