"""LoRA: the baseline with which methods of chosen heads are compared.

Source: Hu et al. (2021), "LoRA: Low-Rank Adaptation of Large Language Models"; see
`jaxheads.edits.low_rank`. The model is frozen; each weight chosen gets a product of two thin
matrices beside it. The paper's setting for GPT-2 and GPT-3: queries and values, r = 4 and
alpha = 32 or r = 8, AdamW, learning rate 2e-4 with linear decay. Trained scalars of r = 8 on
SmolLM2-135M's queries and values: 30 * 8 * ((576 + 576) + (576 + 192)) = 460,800, against 14 * 64 =
896 of LoFiT with 14 heads.

The result is an edit, which `jaxheads.fold` bakes exactly into the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax

from jaxheads.edits import Edits
from jaxheads.edits.low_rank import LORA_SITES, lora
from jaxheads.methods.method import Data, Tuned
from jaxheads.methods.objective import fit_loss, rows_of
from jaxheads.model.transformer import Transformer
from jaxheads.train.fit import Fit
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.step import Metrics

if TYPE_CHECKING:
    from jaxheads.train.job import Job

Array = jax.Array
NAME = "lora"


@dataclass(frozen=True)
class Lora:
    """Settings.

    Attributes:
      rank: r of every factor.
      alpha: the change is multiplied by alpha / r.
      sites: the weights, by the sites that they write; see `jaxheads.edits.low_rank.lora`.
      fit: how the factors are trained.
    """

    rank: int = 8
    alpha: float = 16.0
    sites: tuple[str, ...] = LORA_SITES
    fit: Fit = field(
        default_factory=lambda: Fit(
            steps=40, optimizer=Optimizer(learning_rate=2e-3, schedule="linear", clip=1.0)
        )
    )

    def train(self, job: Job, model: Transformer, tokenizer: Any, data: Data) -> dict[str, Tuned]:
        """Trains the factors.

        Raises:
          ValueError: settings that `lora` refuses.
        """
        key = jax.random.key(job.seed)
        edits = lora(model.config, key, self.rank, self.alpha, self.sites)
        trained = job.fit(NAME, edits_loss, edits, model, fit=self.fit, **rows_of(data))
        count = sum(leaf.size for leaf in jax.tree.leaves(trained))
        return {NAME: Tuned(edits=trained, trained=count)}


def edits_loss(
    edits: Edits, model: Transformer, item: Any, key: Array | None
) -> tuple[Array, Metrics]:
    """The loss of a frozen model as a function of edits that are trained; see `fit_loss`."""
    return fit_loss(model, item, edits=edits)
