"""A two-layer model whose weights are written by hand, so that its circuit is known.

It does induction by K composition (Elhage et al. 2021; Olsson et al. 2022): after
"A B ... A" it predicts B.

- Head 0.1 (`PREVIOUS`) attends to the previous position and writes the token found there.
- Head 1.2 (`INDUCTION`) looks with the present token for a position whose previous token it is,
  by keys that read what head 0.1 wrote, and raises the logit of the token at that position.

Four query heads share two key/value heads: head 0.1 uses keys and values 0.0, head 1.2 uses
1.1. All other heads and both MLPs compute something of every token, but write it to directions
that nobody reads, so they act only through the norms, by less than a hundredth. A constant in
every embedding keeps the norms nearly the same whatever else is in the stream, so that first-order
methods are not led astray by them.

The prompts of a pair differ in all tokens and in no position. So the edges that carry
positions, "embed" -> "a0.1.q" and "a0.0.k", do nothing here, and `EDGES` are those that carry
tokens. Each of them alone takes away most of the logit difference when corrupted.
"""

import functools

import jax
import numpy as np

from jaxheads import Batch, ModelConfig, Transformer
from jaxheads.sweep.metrics import LogitDifference
from jaxheads.tasks.pairs import Pairs

PREVIOUS = (0, 1)
INDUCTION = (1, 2)
EDGES = (
    ("embed", "a0.0.v"),
    ("embed", "a1.2.q"),
    ("embed", "a1.1.v"),
    ("a0.1", "a1.1.k"),
    ("a1.2", "logits"),
)
"""From sender to receiver; q by query head, k and v by key/value head."""

SIZE = 24  # tokens of the vocabulary, and head size
PLACES = 16
UNREAD = 8
DISTINCT = 8  # tokens of a prompt before they repeat

# Where things stand in the residual stream.
TOKEN = slice(0, SIZE)
PREVIOUS_TOKEN = slice(SIZE, 2 * SIZE)
ANSWER = slice(2 * SIZE, 3 * SIZE)
PLACE = slice(3 * SIZE, 3 * SIZE + PLACES)
REST = slice(3 * SIZE + PLACES, 3 * SIZE + PLACES + UNREAD)
CONSTANT = REST.stop
WIDTH = CONSTANT + 1
HEIGHT = 6.0  # of the constant; all else in the stream is of size one


@functools.cache
def planted_model(sharpness: float = 4.0) -> Transformer:
    """The model. `sharpness` is the attention logit of head 1.2 for a match, against 0.

    Learned positions, root mean square norms (also the last), MLPs gated, embedding untied.
    """
    config = ModelConfig(
        n_layers=2, n_heads=4, n_kv_heads=2, head_dim=SIZE, d_model=WIDTH, d_mlp=12,
        vocab_size=SIZE, context_length=PLACES, n_positions=PLACES, ropes=(None,),
        attn_scale=1.0, tied=False,
    )  # fmt: skip
    params = jax.tree.map(np.array, Transformer.random(config, jax.random.key(0)).params)
    rng = np.random.default_rng(0)
    one = np.eye(SIZE)

    params["embed"]["tokens"][:] = 0
    params["embed"]["tokens"][:, TOKEN] = one
    params["embed"]["positions"][:] = 0
    params["embed"]["positions"][:, PLACE] = np.eye(PLACES)
    params["embed"]["positions"][:, CONSTANT] = HEIGHT
    params["unembed"]["kernel"][:] = 0
    params["unembed"]["kernel"][:, ANSWER] = 5 * one

    # Scales that undo the division where the stream holds 2 (3, 4) parts beside the constant.
    blocks = params["blocks"]
    sizes = np.sqrt((HEIGHT**2 + np.array([2, 3])[:, None]) / WIDTH)
    blocks["attn_norm"]["scale"][:] = sizes
    blocks["mlp_norm"]["scale"][:] = sizes
    params["final_norm"]["scale"][:] = np.sqrt((HEIGHT**2 + 4) / WIDTH)

    # Whatever is not planted reads tokens and writes to the rest.
    attn, mlp = blocks["attn"], blocks["mlp"]
    for name in ("q", "k", "v"):
        attn[name][:] = 0
        attn[name][:, TOKEN] = 0.3 * rng.normal(size=attn[name][:, TOKEN].shape)
    attn["o"][:] = 0
    attn["o"][..., REST] = 0.05 * rng.normal(size=attn["o"][..., REST].shape)
    mlp["down"][:] = 0
    mlp["down"][..., REST] = 0.1 * rng.normal(size=mlp["down"][..., REST].shape)

    for layer, head, group in ((*PREVIOUS, 0), (*INDUCTION, 1)):
        attn["q"][layer, :, head] = 0
        attn["k"][layer, :, group] = attn["v"][layer, :, group] = 0
        attn["v"][layer, TOKEN, group] = one
        attn["o"][layer, head] = 0
    place = slice(0, PLACES)
    attn["q"][0, PLACE, 1, place] = 12 * np.eye(PLACES, k=-1)
    attn["k"][0, PLACE, 0, place] = np.eye(PLACES)
    attn["o"][0, 1, :, PREVIOUS_TOKEN] = one
    attn["q"][1, TOKEN, 2] = sharpness * one
    attn["k"][1, PREVIOUS_TOKEN, 1] = one
    attn["o"][1, 2, :, ANSWER] = one
    return Transformer(config, jax.tree.map(jax.numpy.asarray, params))


def planted_pairs(rows: int = 4, seed: int = 0) -> Pairs:
    """Prompts of 8 random tokens repeated, but for the last, which is the answer.

    The corrupted prompt is the same of 8 other tokens. The wrong answer is another token of
    the clean prompt. [rows, 15] tokens.
    """
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.permutation(SIZE)[: 2 * DISTINCT] for _ in range(rows)]).astype(np.int32)
    clean, corrupted = drawn[:, :DISTINCT], drawn[:, DISTINCT:]

    def batch(tokens: np.ndarray) -> Batch:
        tokens = np.concatenate([tokens, tokens[:, :-1]], axis=1)
        return Batch(tokens, np.ones(tokens.shape, bool))

    slots = np.full(rows, 2 * DISTINCT - 2, np.int32)
    return Pairs(batch(clean), batch(corrupted), clean[:, -1:], clean[:, 1:2], slots)


def planted_metric(pairs: Pairs) -> LogitDifference:
    """Logit of the answer minus that of the wrong answer, at the last token."""
    return LogitDifference.of(pairs.clean, pairs.answers, pairs.wrong)
