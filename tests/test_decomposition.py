"""Contextual decomposition: conservation (T7), exact paths, ablation identities, shares."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from tiny import close, mostly_slow, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads import tasks
from jaxheads.circuits.cdt import cdt_parts, cdt_relevance, cdt_relevance_to
from jaxheads.circuits.cdt_nodes import Node, head_nodes
from jaxheads.circuits.decomposition import SMALL

BATCH = jh.pack([list(row) for row in tiny_tokens()])
SITES = (
    "resid_pre", "attn_in", "q_pre", "k_pre", "q", "k", "v", "z", "attn_out", "resid_mid",
    "mlp_in", "neurons", "mlp_out", "resid_post",
)  # fmt: skip

VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {"kind": "mha"},
    "gqa-biases": {"biases": True, "norm": "layer", "norm_bias": True},
    "mqa-plain": {"kind": "mqa", "gated": False, "activation": "gelu", "biases": True},
    "parallel": {"parallel": True, "norm": "layer", "biases": True},
    "qk-norm": {"qk_norm": "head", "norm_plus_one": True, "branch_scale": True},
    "windows": {"windows": (0, 4, 0), "attn_softcap": 5.0, "rotary_dim": 4},
}
PLACES = ("pre", "post", "branch", "sandwich")
HEAD = Node("z", 0, 0)
SOURCE = [Node("z", 0, 2), Node("mlp_out", 1, None, -3)]


def random_means(model) -> dict[str, np.ndarray]:
    c, rng = model.config, np.random.default_rng(3)
    z = rng.normal(size=(c.n_layers, c.n_heads, c.head_dim))
    return {"z": z, "mlp_out": rng.normal(size=(c.n_layers, c.d_model))}


def no_means(model) -> dict[str, np.ndarray]:
    means = {name: 0 * mean for name, mean in random_means(model).items()}
    return means | {"resid_pre": means["mlp_out"]}


def every_node(model) -> list[Node]:
    layers = range(model.config.n_layers)
    return [Node("resid_pre", 0), *head_nodes(model), *(Node("mlp_out", i) for i in layers)]


class Pairs:
    """The rules of the paper on explicit pairs (relevant, irrelevant), in float64."""

    def __init__(self, model, means, taps):
        self.config, self.means, self.taps = model.config, means, taps
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), model.params["blocks"])
        self.found: dict[str, list] = {site: [] for site in SITES}

    def linear(self, pair, weight, bias, layer, spec):
        r, i = (np.einsum(spec, part, weight[layer]) for part in pair)
        if bias is None:
            return r, i
        size = abs(r) + abs(i) + SMALL
        return r + bias[layer] * abs(r) / size, i + bias[layer] * abs(i) / size

    def norm(self, pair, params, layer):
        scale = params["scale"][layer] + self.config.norm_plus_one
        total, (r, i) = sum(pair), pair
        if self.config.norm == "layer":
            total, r, i = (x - x.mean(-1, keepdims=True) for x in (total, r, i))
        size = np.sqrt((total**2).mean(-1, keepdims=True) + self.config.norm_eps)
        r, i = r / size * scale, i / size * scale
        if "bias" in params:
            both = abs(pair[0]) + abs(pair[1]) + SMALL
            r = r + params["bias"][layer] * abs(pair[0]) / both
            i = i + params["bias"][layer] * abs(pair[1]) / both
        return r, i

    def see(self, site, pair):
        self.found[site].append(pair)
        return pair

    def heads(self, layer, pair):
        c, p = self.config, self.params["attn"]
        pairs = {}
        for name in "qkv":
            spec = "btd,dhe->bthe"
            pairs[name] = self.linear(pair, p[name], p.get(f"{name}_bias"), layer, spec)
        for name in "qk":
            self.see(f"{name}_pre", pairs[name])
            if c.qk_norm != "none":
                pairs[name] = self.norm(pairs[name], p[f"{name}_norm"], layer)
            self.see(name, tuple(self.rotate(part) for part in pairs[name]))
        self.see("v", pairs["v"])
        pattern = self.taps["pattern"][layer]
        groups = [np.repeat(part, c.group_size, axis=2) for part in pairs["v"]]
        r, i = (np.einsum("bhts,bshe->bthe", pattern, part) for part in groups)
        if layer == 0:
            mean = self.means["z"][0, 2]
            r[:, :, 2], i[:, :, 2] = r[:, :, 2] + i[:, :, 2] - mean, mean
        z = self.see("z", (r, i))
        return self.linear(z, p["o"], p.get("o_bias"), layer, "bthe,hed->btd")

    def rotate(self, x):
        c = self.config
        half = c.rotated_dim // 2
        angle = np.arange(x.shape[1])[:, None] * 10_000.0 ** -(np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b, rest = np.split(x, (half, 2 * half), axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)

    def neurons(self, layer, pair):
        p, spec = self.params["mlp"], "btd,df->btf"
        up = self.linear(pair, p["up"], p.get("up_bias"), layer, spec)
        if not self.config.gated:
            f = lambda x: np.asarray(jax.nn.gelu(x, approximate=False), np.float64)  # noqa: E731
            return f(sum(up)) - f(up[1]), f(up[1])
        gate = self.linear(pair, p["gate"], p.get("gate_bias"), layer, spec)
        f = lambda g, u: g / (1 + np.exp(-g)) * u  # noqa: E731
        return f(sum(gate), sum(up)) - f(gate[1], up[1]), f(gate[1], up[1])

    def run(self):
        p = self.params
        x = (0 * self.taps["resid_pre"][0], self.taps["resid_pre"][0])
        for layer in range(self.config.n_layers):
            before = self.see("resid_pre", x)
            out = self.heads(layer, self.see("attn_in", self.norm(x, p["attn_norm"], layer)))
            out = self.see("attn_out", self.scaled(out, "attn_scale", layer))
            x = self.see("resid_mid", add(x, out))
            read = before if self.config.parallel else x
            out = self.neurons(layer, self.see("mlp_in", self.norm(read, p["mlp_norm"], layer)))
            down, bias = p["mlp"]["down"], p["mlp"].get("down_bias")
            out = self.linear(self.see("neurons", out), down, bias, layer, "btf,fd->btd")
            r, i = self.scaled(out, "mlp_scale", layer)
            if layer == 1:
                mean = self.means["mlp_out"][1]
                r[:, -3], i[:, -3] = r[:, -3] + i[:, -3] - mean, mean
            x = self.see("resid_post", add(x, self.see("mlp_out", (r, i))))
        return {
            site: tuple(map(np.stack, zip(*ps, strict=True))) for site, ps in self.found.items()
        }

    def scaled(self, pair, name, layer):
        return tuple(x * self.params[name][layer] if name in self.params else x for x in pair)


def add(a, b):
    return tuple(x + y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, *list(VARIANTS)[:2]))
def test_t7_parts_sum_to_the_activation_at_every_node(variant):
    model = tiny_model(**VARIANTS[variant])
    means = random_means(model)
    taps = model(BATCH, taps=(*SITES, "pattern")).taps
    pairs = Pairs(model, means, {k: np.asarray(v, np.float64) for k, v in taps.items()}).run()
    found = cdt_parts(model, BATCH, SOURCE, means, SITES)
    for site in SITES:
        relevant, irrelevant = pairs[site]
        close(relevant + irrelevant, taps[site], 1e-4)
        close(found[site], relevant, 1e-4)
    assert np.abs(found["resid_post"][-1]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "attention"), [*((place, "pattern") for place in PLACES), ("pre", "difference")]
)
def test_all_is_relevant_where_all_is_a_source_without_means(place, attention):
    model = tiny_model("mqa", norm_place=place, logit_softcap=3.0, logit_scale=0.5, tied=False)
    means, nodes = no_means(model), every_node(model)
    taps = model(BATCH, taps=SITES).taps
    found = cdt_parts(model, BATCH, nodes, means, SITES, attention=attention)
    for site in SITES:
        close(found[site], taps[site], 1e-4)
    answers, wrong = np.array([5, 6]), np.array([7, 8])
    relevance = cdt_relevance(model, BATCH, answers, wrong, [nodes], means, attention=attention)
    close(relevance[0], jh.logit_difference(model, BATCH, answers, wrong), 1e-4)


def test_a_linear_model_gives_the_sum_over_paths():
    """Weights of attention and divisors of norms held, no MLP: every path is a matrix product."""
    model = tiny_model("gqa")
    params = model.params
    mlp = params["blocks"]["mlp"] | {"down": jnp.zeros_like(params["blocks"]["mlp"]["down"])}
    model = jh.Transformer(model.config, params | {"blocks": params["blocks"] | {"mlp": mlp}})
    taps = model(BATCH, taps=("resid_pre", "pattern", "z")).taps
    means = random_means(model)
    p, taps = jax.tree.map(np.asarray, (params["blocks"], taps))

    def hop(layer, head, x):
        size = np.sqrt((taps["resid_pre"][layer] ** 2).mean(-1, keepdims=True) + 1e-5)
        value = x / size * p["attn_norm"]["scale"][layer] @ p["attn"]["v"][layer, :, head // 3]
        return taps["pattern"][layer, :, head] @ value @ p["attn"]["o"][layer, head]

    write = (taps["z"][0, :, :, 4] - means["z"][0, 4]) @ p["attn"]["o"][0, 4]
    expected = write
    for length in (1, 2):
        for layers in itertools.combinations((1, 2), length):
            for heads in itertools.product(range(6), repeat=length):
                path = write
                for layer, head in zip(layers, heads, strict=True):
                    path = hop(layer, head, path)
                expected = expected + path
    found = cdt_parts(model, BATCH, Node("z", 0, 4), means, ["resid_post"])
    close(found["resid_post"][-1], expected)
    assert np.abs(expected - write).max() > 0.1


@struct.dataclass
class HeldNorm:
    """The norm of a branch's input with the divisor of a clean run."""

    clean: jax.Array
    read: str = struct.field(pytree_node=False)
    source: jax.Array

    def __call__(self, value, context):
        return getattr(context, self.read) * (self.clean / self.source)


@pytest.mark.parametrize("attention", ["pattern", "difference"])
def test_irrelevant_is_the_mean_ablated_run_with_norms_held(attention):
    """Without biases; with the weights of attention held too under the rule "pattern"."""
    model = tiny_model("gqa")
    means = random_means(model)
    clean = model(BATCH, taps=("resid_pre", "attn_in", "resid_mid", "mlp_in", "pattern")).taps
    edits = jh.mask_heads(model.config, [(0, 2)], "mean", means=jnp.asarray(means["z"]))
    held = {
        "attn_in": HeldNorm(clean["attn_in"], "resid_pre", clean["resid_pre"]),
        "mlp_in": HeldNorm(clean["mlp_in"], "resid_mid", clean["resid_mid"]),
    }
    if attention == "pattern":
        held["pattern"] = jh.Mix(clean["pattern"], jnp.ones((3, 1, 1, 1, 1)))
    ablated = model(BATCH, edits={**edits, **held}, taps=("resid_post", "q")).taps
    found = cdt_parts(
        model, BATCH, Node("z", 0, 2), means, ["resid_post", "q"], attention=attention
    )
    taps = model(BATCH, taps=("resid_post", "q")).taps
    for site in taps:
        close(taps[site] - found[site], ablated[site])
    assert np.abs(found["resid_post"][-1]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model = tiny_model("gqa", biases=True)
    means, rows = random_means(model), [list(tiny_tokens(1, 9)[0]), list(tiny_tokens(1, 13, 1)[0])]
    sources = [
        Node("z", 0, 1),
        Node("z", 1, 3, -2),
        Node("mlp_out", 0, None, 4),
        Node("z", 0, 5, (3, 6)),
    ]
    targets = [Node("q", 2, 4, -1), Node("mlp_in", 2)]
    answers, wrong = np.array([5, 6]), np.array([7, 8])
    batch = jh.pack(rows, side=side, length=16)
    found = cdt_relevance(model, batch, answers, wrong, sources, means)
    share = cdt_relevance_to(
        model, jh.pack([rows[0]] * 2, side=side, length=16), sources, targets, means
    )
    for row in range(2):
        alone = jh.pack([rows[row]])
        own = [
            Node(
                s.site,
                s.layer,
                s.head,
                s.position[row] if isinstance(s.position, tuple) else s.position,
            )
            for s in sources
        ]
        ids = (answers[[row]], wrong[[row]])
        close(found[:, row], cdt_relevance(model, alone, *ids, own, means)[:, 0])
    same = [Node("z", 0, 5, (3, 6)) if s.head == 5 else s for s in sources]
    close(share, cdt_relevance_to(model, jh.pack([rows[0]] * 2), same, targets, means))


@pytest.mark.slow
def test_relevance_does_not_depend_on_order_and_chunks():
    model = tiny_model("gqa")
    means, ids = random_means(model), (np.array([5, 6]), np.array([7, 8]))
    sources = head_nodes(model)[::-1]
    whole = cdt_relevance(model, BATCH, *ids, sources, means)
    close(cdt_relevance(model, BATCH, *ids, sources, means, chunk=5), whole)
    for index in (0, 7, 17):
        close(cdt_relevance(model, BATCH, *ids, sources[index : index + 1], means)[0], whole[index])
    assert np.abs(whole).min(axis=1).max() > 1e-3


def test_share_is_that_of_the_parts():
    model = tiny_model("gqa", biases=True)
    means = random_means(model)
    targets = [
        Node("q", 2, 4, -1),
        Node("k", 1, 4),
        Node("v", 2, 1),
        Node("z", 2, 0, 5),
        Node("mlp_in", 0, None, (2, 7)),
    ]
    sources = [Node("z", 0, 2), Node("z", 1, 0), Node("z", 2, 0), Node("mlp_out", 0)]
    found = cdt_relevance_to(model, BATCH, sources, targets, means)
    taps = model(BATCH, taps=("q", "k", "v", "z", "mlp_in")).taps
    for row, source in enumerate(sources):
        parts = cdt_parts(model, BATCH, source, means, list(taps))
        for column, target in enumerate(targets):
            head = () if target.head is None else target.head // (3 if target.site in "kv" else 1)
            slots = {None: range(14)}.get(target.position, target.position)
            place = (
                (target.layer, [0, 1], slots)
                if np.ndim(slots) == 1 and len(slots) == 2
                else (target.layer, slice(None), slots)
            )
            r, total = (np.asarray(x[target.site])[place] for x in (parts, taps))
            if target.head is not None:
                r, total = r[..., head, :], total[..., head, :]
            expected = abs(r).sum() / (abs(r).sum() + abs(total - r).sum())
            if source.site == "z" and (source.layer, source.head) == (target.layer, target.head):
                expected = 0.0  # not in itself
            np.testing.assert_allclose(found[row, column], expected, atol=1e-5)
    assert found[2].tolist()[:4] == [0, 0, 0, 0] and found[0, 0] > 0.01


@pytest.mark.slow
def test_means_may_differ_between_slots_and_rows():
    model = tiny_model("gqa")
    mean, ids = random_means(model)["z"], (np.array([5, 6]), np.array([7, 8]))
    sources = head_nodes(model)[:4]
    expected = cdt_relevance(model, BATCH, *ids, sources, {"z": mean})
    for shape in ((3, 14), (3, 2, 14)):
        wide = np.broadcast_to(mean.reshape(3, *(1,) * (len(shape) - 1), 6, 8), (*shape, 6, 8))
        close(cdt_relevance(model, BATCH, *ids, sources, {"z": wide}), expected)
    own = np.asarray(model(BATCH, taps="z").taps["z"])
    close(cdt_relevance(model, BATCH, *ids, sources, {"z": own}), np.zeros((4, 2)))


def relevance(model=None, sources=(HEAD,), ids=(5, 6), **options):
    model = tiny_model("gqa") if model is None else model
    means = options.pop("means", random_means(model) if isinstance(model, jh.Transformer) else {})
    return cdt_relevance(model, BATCH, np.array(ids), np.array([7, 8]), sources, means, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: relevance(attention="patern"), "unknown attention rule 'patern'. Did you mean"),
        (lambda: relevance(tiny_model("gqa").astype("bfloat16")), "expected config.dtype"),
        (lambda: relevance(model=object()), "needs a Transformer"),
        (lambda: relevance(sources=[]), "no sources"),
        (lambda: relevance(sources=[[]]), "a source without nodes"),
        (lambda: relevance(sources=[(0, 1)]), "a source must be a Node"),
        (lambda: relevance(sources=[Node("q", 0, 0)]), "unknown site of a source 'q'"),
        (lambda: relevance(sources=[Node("z", 3, 0)]), "layer must lie in 0..2"),
        (lambda: relevance(sources=[Node("z", 0)]), "head must lie in 0..5"),
        (lambda: relevance(sources=[Node("mlp_out", 0, 1)]), "has no heads"),
        (lambda: relevance(sources=[Node("z", 0, 1, 14)]), "14 real tokens, no such position"),
        (lambda: relevance(sources=[Node("z", 0, 1, (1, 2, 3))]), "2 of them, one per row"),
        (lambda: relevance(chunk=0), "chunk must be at least 1, got 0"),
        (lambda: relevance(means={}), "means has no 'z'"),
        (lambda: relevance(means={"z": np.zeros((3, 6))}), r"means\['z'\] has shape \(3, 6\)"),
        (lambda: relevance(ids=(5, 97)), "token id 97, outside the vocabulary of 97"),
        (lambda: relevance(ids=(5,)), "answers must be one token id per row"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_targets_and_sites_are_named():
    model = tiny_model("gqa")
    means, source = random_means(model), Node("z", 0, 0)
    with pytest.raises(ValueError, match="no targets"):
        cdt_relevance_to(model, BATCH, [source], [], means)
    with pytest.raises(ValueError, match="unknown site of a target 'mlp_out'"):
        cdt_relevance_to(model, BATCH, [source], [Node("mlp_out", 1)], means)
    with pytest.raises(ValueError, match="unknown site 'pattern'"):
        cdt_parts(model, BATCH, source, means, ["pattern"])


def rank_correlation(a, b):
    return np.corrcoef(*(np.argsort(np.argsort(x)) for x in (a, b)))[0, 1]


@pytest.mark.slow
def test_relevance_ranks_the_heads_of_smollm2_as_their_direct_effects(smollm2):
    model, tokenizer = smollm2
    examples = tasks.ioi(8, seed=0, template="went")
    batch = jh.pack([tokenizer.encode(e.prompt) for e in examples])
    others = tasks.ioi(24, seed=1, template="went")
    corrupted = jh.pack([tokenizer.encode(e.corrupted) for e in others])
    mean = np.asarray(model(corrupted, taps="z").taps["z"].mean(axis=1))
    answers, wrong = tasks.contrast(examples, tokenizer).T
    sources = head_nodes(model, position=-1)
    found = cdt_relevance(model, batch, answers, wrong, sources, {"z": mean}).mean(axis=1)

    taps = model(batch, taps=("z", "resid_post")).taps
    final, params = taps["resid_post"][-1, :, -1], model.params
    size = jnp.sqrt((final**2).mean(-1, keepdims=True) + model.config.norm_eps)
    rows = params["embed"]["tokens"][answers] - params["embed"]["tokens"][wrong]
    read = rows * params["final_norm"]["scale"] / size
    added = taps["z"][:, :, -1] - mean[:, None, -1]
    direct = jnp.einsum("lbhe,lhed,bd->lhb", added, params["blocks"]["attn"]["o"], read)
    direct = np.asarray(direct).mean(axis=-1).reshape(-1)
    assert rank_correlation(abs(found), abs(direct)) > 0.5

    # The ten most relevant heads carry more of the answer than ten drawn at random.
    def left(heads):
        edits = jh.mask_heads(model.config, heads, "mean", means=jnp.asarray(mean.mean(axis=1)))
        return float(jh.logit_difference(model, batch, answers, wrong, edits=edits).mean())

    def heads_of(order):
        return [divmod(int(i), 9) for i in order[:10]]

    rng = np.random.default_rng(0)
    controls = [left(heads_of(rng.permutation(270))) for _ in range(5)]
    assert left(heads_of(np.argsort(-found))) < min(controls)
