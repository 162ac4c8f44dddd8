"""DuoAttention: the mixture of full and streaming heads, its gates, and their passkeys."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import on_eight_devices
from test_head_cache import padded, read, some_full
from tiny import close, mostly_slow, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.decode.head_cache import HeadCache
from jaxheads.decode.kinds import HeadKinds
from jaxheads.edits import StreamingMix, streaming_mix
from jaxheads.methods import duo_attention as duo
from jaxheads.methods.measure import measure
from jaxheads.methods.method import TaskData
from jaxheads.tasks import encode
from jaxheads.tasks.passkeys import ORDINALS, WORDS, passkeys
from jaxheads.train.fit import Fit
from jaxheads.train.job import Job
from jaxheads.train.mesh import Mesh, make_mesh
from jaxheads.train.optimizer import Optimizer

LENGTH = 30


def mix(config, alpha):
    return streaming_mix(config, alpha, sinks=2, recent=5)


def task_data(rows=8):
    """Rows whose last six tokens are answers."""
    tokens = tiny_tokens(rows, LENGTH)
    targets = np.zeros(tokens.shape, bool)
    targets[:, -6:] = True
    batch = jh.Batch(tokens, np.ones(tokens.shape, bool), targets)
    return TaskData([], [], batch, batch)


def settings(steps=40, **changes):
    optimizer = Optimizer(learning_rate=0.05, schedule="constant")
    fit = Fit(steps=steps, batch_size=4, optimizer=optimizer)
    return duo.DuoAttention(**({"sinks": 2, "recent": 5, "fit": fit} | changes))


@pytest.mark.parametrize("kind", mostly_slow(("mha", "gqa", "mqa"), "gqa"))
def test_gates_of_one_are_the_model_and_of_zero_a_streaming_cache(kind):
    model = tiny_model(kind)
    config = model.config
    shape = (config.n_layers, config.n_kv_heads)
    rows = [tiny_tokens(1, n, n)[0].tolist() for n in (LENGTH, 17)]
    tokens, mask = padded(rows, LENGTH)
    plain = model(tokens, mask).logits
    close(model(tokens, mask, edits=mix(config, np.ones(shape))).logits[mask], plain[mask], 1e-6)
    for full in (np.zeros(shape, bool), some_full(config)):
        found = model(tokens, mask, edits=mix(config, full)).logits
        kinds = HeadKinds(full, sinks=2, recent=5)
        cache = HeadCache.empty(config, kinds, 2, LENGTH)
        expected, _ = read(model, cache, tokens, mask, [20] + [1] * 10)
        close(found[mask], expected[mask])
        assert np.abs(np.asarray(found - plain))[mask].max() > 0.01


def test_a_gate_mixes_its_group_alone():
    model = tiny_model()
    tokens = tiny_tokens(1, LENGTH)
    alpha = np.ones((3, 2))
    ends = []
    for value in (0.0, 1.0, 0.25):
        alpha[2, 1] = value
        taps = model(tokens, edits=mix(model.config, alpha), taps="z").taps
        ends.append(np.asarray(taps["z"]))
    streamed, whole, mixed = ends
    changed = np.abs(whole - streamed).max(axis=(1, 2, 4)) > 1e-3
    np.testing.assert_array_equal(np.argwhere(changed), [(2, 3), (2, 4), (2, 5)])
    close(mixed, 0.25 * whole + 0.75 * streamed)


def test_a_mixture_is_saved_and_read(tmp_path):
    model = tiny_model()
    tokens, edits = tiny_tokens(1, LENGTH), mix(model.config, some_full(model.config))
    edits.save(tmp_path / "mix.safetensors")
    again = jh.Edits.load(tmp_path / "mix.safetensors", [StreamingMix])
    chex.assert_trees_all_equal(
        model(tokens, edits=again).logits, model(tokens, edits=edits).logits
    )


def test_the_gate_of_the_only_head_that_writes_stays_open():
    model = tiny_model()
    params = model.params
    only = np.zeros((3, 6, 1, 1), np.float32)
    only[1, 3:] = 3.0
    o = params["blocks"]["attn"]["o"] * only
    attn = {**params["blocks"]["attn"], "o": o}
    params = {**params, "blocks": {**params["blocks"], "attn": attn}}
    model = jh.Transformer(model.config, params)
    gates = duo.scores(Job(), model, task_data(), settings(penalty=0.01))
    assert gates.shape == (3, 2) and (gates >= 0).all() and (gates <= 1).all()
    others = np.delete(gates.ravel(), 3)
    assert gates[1, 1] > 0.5 and (others < 0.01).all()


def test_the_penalty_closes_gates_and_without_one_none_moves():
    model, job = tiny_model(), Job()
    closed = duo.scores(job, model, task_data(), settings(penalty=1000.0))
    assert (closed < 1e-6).all()
    still = duo.scores(job, model, task_data(), settings(penalty=0.0, steps=5))
    close(still, np.ones((3, 2)), 1e-6)
    light, heavy = (
        duo.scores(job, model, task_data(), settings(penalty=penalty, steps=20)).mean()
        for penalty in (0.01, 0.1)
    )
    assert heavy < light


def test_only_the_states_that_predict_targets_count():
    model = tiny_model()
    batch = task_data(2).train_batch
    teacher = duo.Teacher(model, np.float32(0.5))
    edits = mix(model.config, np.full((3, 2), 0.5))
    loss, metrics = duo.gates_loss(edits, teacher, (batch, batch.answers()), None)
    ours, theirs = (
        np.asarray(model(batch, edits=e, taps="final").taps["final"])[:, -7:-1]
        for e in (edits, None)
    )
    close(metrics["distance"], np.square(ours - theirs).mean())
    close(loss, metrics["distance"] + 0.5 * 0.5)
    assert float(metrics["weight"]) == 12
    gradient = jax.grad(lambda m: duo.gates_loss(m, teacher, batch, None)[0])(edits)
    step = 1e-2
    alpha = np.full((2, 3, 2), 0.5)
    alpha[0, 1, 0] += step
    alpha[1, 1, 0] -= step
    ends = [duo.gates_loss(mix(model.config, a), teacher, batch, None)[0] for a in alpha]
    slope = float(ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(gradient["z"].alpha[1, 0], slope, rtol=0.02)


def test_the_loss_is_compiled_once_for_all_gates():
    loss = jax.jit(chex.assert_max_traces(duo.gates_loss, n=1))
    model, batch = tiny_model(), task_data().train_batch
    for penalty in (0.1, 0.2):
        loss(mix(model.config, np.full((3, 2), penalty)), duo.Teacher(model, penalty), batch, None)
    chex.clear_trace_counter()


def test_the_method_keeps_the_best_heads_and_random_ones_beside_them():
    model, data = tiny_model(), task_data()
    found = settings(steps=10, heads=0.5, controls=2).train(Job(), model, None, data)
    assert list(found) == ["duo_attention", "streaming", "mixture", "random 1", "random 2"]
    best = found["duo_attention"]
    assert best.trained == 6 and best.scores.shape == (3, 2)
    kinds = HeadKinds.all_streaming(model.config, sinks=2, recent=5).keeping(best.scores, heads=3)
    np.testing.assert_array_equal(best.edits["z"].alpha, kinds.full)
    assert best.heads == [tuple(pair) for pair in np.argwhere(kinds.full)]
    np.testing.assert_array_equal(found["mixture"].edits["z"].alpha, best.scores)
    assert found["streaming"].heads == [] and len(found["random 1"].heads) == 3
    expected = jh.next_token_loss(model, data.held_out_batch, edits=best.edits)
    close(measure(Job(), model, data, best)["loss"], expected)


MESHES = (({"tensor": 4}, 2), ({"tensor": 2, "fsdp": 2}, 4), ({"sequence": 2, "tensor": 4}, 2))


def sharded() -> list[list[float]]:
    """The lowest gate, and how far gates are from those of one device, for each mesh."""
    found = []
    for fields, kv_heads in MESHES:
        shape = {"n_layers": 2, "n_heads": 8, "n_kv_heads": kv_heads, "head_dim": 8, "d_model": 32}
        config = jh.ModelConfig(**shape, d_mlp=128, vocab_size=256, context_length=64)
        model = jh.Transformer.random(config, jax.random.key(0))
        # A large eps: else rounding decides the sign of the step of a gradient near zero.
        adam = Optimizer(learning_rate=0.05, eps=1e-3)
        fit = Fit(steps=3, batch_size=8, optimizer=adam)
        gates = [
            duo.scores(Job(mesh=mesh), model, task_data(), settings(fit=fit, penalty=0.1))
            for mesh in (None, make_mesh(Mesh(**fields), jax.devices()))
        ]
        found.append([float(gates[0].min()), float(np.abs(gates[0] - gates[1]).max())])
    return found


@pytest.mark.slow
def test_gates_are_the_same_over_eight_devices():
    for least, difference in on_eight_devices(sharded):
        assert least < 0.99 and difference < 1e-5


def test_passkeys_are_asked_for_in_turn(smollm2_tokenizer):
    examples = passkeys(40, seed=0, keys=4, words=3, sentences=6)
    encoded = encode(examples, smollm2_tokenizer)
    for index, example in enumerate(examples):
        start, end = example.needle
        assert example.prompt[start:end] == example.answer.strip() == example.group
        name = ORDINALS[index % 4]
        assert f"What is the {name} passkey?" in example.prompt
        assert example.prompt[:start].endswith(f"The {name} passkey is: ")
        assert example.wrong.strip() in example.prompt and example.wrong != example.answer
        assert [example.prompt.count(f"{other} passkey is: ") for other in ORDINALS[:5]] == [
            1, 1, 1, 1, 0,
        ]  # fmt: skip
        assert set(example.group.split()) <= set(WORDS)
        tokens = encoded.batch.tokens[index]
        asked = tokens[encoded.batch.targets[index]]
        assert tokens[encoded.needle[index]].tolist() == asked.tolist()
    assert examples == passkeys(40, seed=0, keys=4, words=3, sentences=6)
    assert len({example.prompt for example in passkeys(60, seed=1)}) == 60
    assert passkeys(1, seed=0, keys=1)[0].wrong is None


@pytest.fixture(scope="module")
def smollm2_tokenizer():
    """The tokenizer of SmolLM2, without the model."""
    from jaxheads.convert.load import load_config

    return load_config("smollm2-135m-instruct")[1]


def test_mistakes_are_named():
    model = tiny_model()
    config, tokens = model.config, tiny_tokens(1, 8)
    with pytest.raises(ValueError, match=r"alpha has shape \(2, 2\), expected \(3, 2\)"):
        streaming_mix(config, np.ones((2, 2)))
    with pytest.raises(ValueError, match="recent must be at least 1, got 0"):
        streaming_mix(config, np.ones((3, 2)), recent=0)
    with pytest.raises(ValueError, match="sinks must be at least 0, got -1"):
        streaming_mix(config, np.ones((3, 2)), sinks=-1)
    with pytest.raises(ValueError, match="for causal models"):
        streaming_mix(dataclasses.replace(config, causal=False), np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"shape \(6,\) per layer, expected \(2,\)"):
        model(tokens, edits=jh.Edits(z=StreamingMix(jnp.ones((3, 6)))))
    with pytest.raises(ValueError, match=r"keys of 8 tokens, .* use jaxheads.decode.HeadCache"):
        model(tokens, edits=mix(config, np.ones((3, 2))), cache=jh.model.empty_cache(config, 1, 9))
    with pytest.raises(ValueError, match=r"heads must be a share in \[0, 1\], got 1.5"):
        duo.DuoAttention(heads=1.5)
    with pytest.raises(ValueError, match="penalty must be at least 0, got -1"):
        duo.DuoAttention(penalty=-1)
    with pytest.raises(ValueError, match="unknown remat 'ful'"):
        duo.DuoAttention(remat="ful")
    for options, message in (
        ({"keys": 0}, "keys must be at least 1, got 0"),
        ({"keys": 11}, "keys must be at most 10, got 11"),
        ({"keys": 5, "sentences": 4}, "sentences must be at least as many as the 5 keys, got 4"),
        ({"words": 0}, "words must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            passkeys(1, seed=0, **options)
