"""DuoAttention: one gate per key/value head, trained to find the heads that need the whole context.

Source: Xiao et al. (2024), "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and
Streaming Heads", section 2.2; the released code for what the paper leaves open. The output of
every head becomes alpha * z + (1 - alpha) * z_stream (`jaxheads.edits.StreamingMix`), alpha starts
at 1, and all that is trained is alpha:

    loss = |H - H_mix|^2 + penalty * |alpha|_1

where H are the hidden states after the last norm of the model as it is, without gradient, and H_mix
those of the mixture, at the tokens that answer questions about passkeys in a long text
(`tasks.passkeys`). The heads of the highest gates then keep the whole context and the others stream
(`HeadKinds.keeping`). Published settings: penalty 0.05; AdamW, learning rate 0.02, with a warm-up
and a decay of 400 steps each from and to a tenth of it; 2,000 steps of one row of up to 32,000
tokens with 10 passkeys of 32 words; 128 sinks and 256 recent tokens in training, 64 and 256 in use;
half of the heads full with grouped queries, a quarter without.

What the reference code does differently from the paper, and what is done here:

- It takes means, of squares over features and of |alpha| over heads, where the paper writes sums.
  So does this.
- Its z in the mixture comes from the teacher's hidden states; only z_stream is computed from the
  student's. Here both are the student's, which is the model that will run.
- It counts the tokens of the questions too, and the states at the tokens counted. Here the states
  that predict a passkey's tokens count, and nothing else.
- It clips the gates before each step and in the mixture, so that a gate outside [0, 1] has no
  gradient. Here the step itself ends in [0, 1].
- It breaks ties of gates by noise of up to 1e-6; here they go to the earlier head.
- Its first chunk of a prompt is read with full attention in all heads: `HeadKinds.prefill`.
- A row here asks for one passkey of its text and not for all in turn, so that the held-out loss is
  that of passkeys alone.

Measured: docs/caches.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from jaxheads.decode.kinds import HeadKinds
from jaxheads.edits import streaming_mix
from jaxheads.methods.measure import readable
from jaxheads.methods.method import Data, Tuned
from jaxheads.methods.objective import rows_of
from jaxheads.methods.retrieval_heads import Head
from jaxheads.model.batch import Batch
from jaxheads.model.config import ModelConfig
from jaxheads.model.layout import REMAT
from jaxheads.model.transformer import Transformer
from jaxheads.names import choose
from jaxheads.token_scores import mean, next_tokens
from jaxheads.train.fit import Fit
from jaxheads.train.job import Job
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.rules import Rule
from jaxheads.train.step import Metrics

if TYPE_CHECKING:
    from jaxheads.text import Tokenizer

Array = jax.Array
NAME = "duo_attention"


@dataclass(frozen=True)
class DuoAttention:
    """Settings.

    Attributes:
      heads: share of the key/value heads that are full in the end.
      sinks: first tokens that a streaming head sees.
      recent: last tokens that it sees.
      penalty: weight of the mean gate.
      controls: random sets of as many heads to compare with.
      remat: what blocks keep for the backward pass, as in `Transformer`.
      fit: of the gates.

    Raises:
      ValueError: an unknown `remat`, a share outside [0, 1], numbers below their least.
    """

    heads: float = 0.5
    sinks: int = 4
    recent: int = 32
    penalty: float = 0.05
    controls: int = 5
    remat: str = "none"
    fit: Fit = field(
        default_factory=lambda: Fit(
            steps=150,
            batch_size=1,
            optimizer=Optimizer(learning_rate=0.05, schedule="wsd", warmup=10, end=0.1),
        )
    )

    def __post_init__(self) -> None:
        choose("remat", self.remat, REMAT)
        if not 0 <= self.heads <= 1:
            raise ValueError(f"heads must be a share in [0, 1], got {self.heads}")
        for name, least in (("sinks", 0), ("recent", 1), ("penalty", 0), ("controls", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def train(
        self, job: Job, model: Transformer, tokenizer: Tokenizer | None, data: Data
    ) -> dict[str, Tuned]:
        """Trains the gates and chooses the heads.

        Returns:
          "duo_attention", with the best heads full, "streaming", with none, "mixture", with the
          gates as they were trained, and "random 1", ..., with as many full heads as the first.
          Edits are `StreamingMix` for running without a cache; `Tuned.heads` are key/value heads.
          The gates are the `scores`, [L,K].
        """
        config = model.config
        gates = scores(job, model, data, self)
        kinds = HeadKinds.all_streaming(config, sinks=self.sinks, recent=self.recent)
        chosen = kinds.keeping(gates, heads=self.heads)
        found = {
            NAME: replace(self._tuned(config, chosen.full), trained=gates.size, scores=gates),
            "streaming": self._tuned(config, kinds.full),
            "mixture": replace(self._tuned(config, gates), trained=gates.size, heads=None),
        }
        rng = np.random.default_rng(job.seed)
        for n in range(1, self.controls + 1):
            drawn = kinds.keeping(rng.random(gates.shape), heads=self.heads)
            found[f"random {n}"] = self._tuned(config, drawn.full)
        return found

    def _tuned(self, config: ModelConfig, alpha: np.ndarray) -> Tuned:
        edits = streaming_mix(config, alpha, sinks=self.sinks, recent=self.recent)
        return Tuned(edits=edits, heads=_heads(alpha))


def scores(
    job: Job, model: Transformer, data: Data, settings: DuoAttention | None = None
) -> np.ndarray:
    """How much each key/value head needs the whole context, for `HeadKinds.keeping`.

    Args:
      job: the devices, the folder, the loop and the seed.
      model: a causal language model; it stays as it is.
      data: rows whose targets have to be predicted from far back, such as `task:passkeys`.
      settings: of the method; None for the defaults.

    Returns:
      The trained gates, float32 [L,K] between 0 and 1.

    Raises:
      ValueError: a model that is not causal; what `Job.fit` refuses.
    """
    settings = DuoAttention() if settings is None else settings
    config = model.config
    alpha = jnp.ones((config.n_layers, config.n_kv_heads))
    mix = streaming_mix(config, alpha, sinks=settings.sinks, recent=settings.recent)
    trained = replace(job, rules=(*job.rules, Rule("alpha|penalty", None))).fit(
        NAME,
        gates_loss,
        mix,
        Teacher(model, np.array(settings.penalty, np.float32), settings.remat),
        fit=replace(settings.fit, optimizer=Clipped(**asdict(settings.fit.optimizer))),
        **rows_of(data),
    )
    gates: np.ndarray = np.asarray(readable(trained)["z"].alpha)
    return gates


@dataclass(frozen=True)
class Clipped(Optimizer):
    """An optimizer whose every step ends in [0, 1]."""

    def build(self, steps: int, mask: Any = None) -> optax.GradientTransformation:
        """The transformation; see `Optimizer.build`."""
        inner = super().build(steps, mask)

        def update(gradient: Any, state: Any, params: Any) -> tuple[Any, Any]:
            change, state = inner.update(gradient, state, params)
            ended = jax.tree.map(lambda x, dx: jnp.clip(x + dx, 0, 1) - x, params, change)
            return ended, state

        return optax.GradientTransformation(inner.init, update)


@struct.dataclass
class Teacher:
    """What the mixture is compared with.

    Attributes:
      model: as it is.
      penalty: float32 [], weight of the mean gate.
      remat: as in `DuoAttention`. Static.
    """

    model: Transformer
    penalty: Array | np.ndarray
    remat: str = struct.field(pytree_node=False, default="none")


def gates_loss(mix: Any, teacher: Teacher, item: Any, key: Array | None) -> tuple[Array, Metrics]:
    """Mean squared difference of the last hidden states + penalty * mean |alpha|.

    Args:
      mix: `streaming_mix`, what is trained.
      teacher: the model without it.
      item: a `Batch`, or one with its answers; states that predict targets count.
      key: not used.

    Returns:
      The loss, and the metrics "weight", the number of targets, "distance", the first term, and
      "mean_gate".
    """
    del key
    model, batch = teacher.model, item if isinstance(item, Batch) else item[0]
    theirs = jax.lax.stop_gradient(model(batch, taps="final").taps["final"])
    ours = model(batch, edits=mix, taps="final", remat=teacher.remat).taps["final"]
    squares = jnp.square(ours.astype(jnp.float32) - theirs.astype(jnp.float32))
    _, counted = next_tokens(batch)
    distance = mean(jnp.mean(squares, axis=-1), counted)
    gate = jnp.mean(jnp.abs(mix["z"].alpha))
    metrics = {
        "weight": jnp.sum(counted, dtype=jnp.float32),
        "distance": distance,
        "mean_gate": gate,
    }
    return distance + teacher.penalty * gate, jax.lax.stop_gradient(metrics)


def _heads(full: np.ndarray) -> Sequence[Head]:
    """The key/value heads that are full."""
    return [(int(layer), int(head)) for layer, head in np.argwhere(full == 1)]
