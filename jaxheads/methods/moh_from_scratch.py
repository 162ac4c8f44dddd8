"""A small language model from scratch whose heads are routed from the first step.

Source: Jin et al. (2024), "MoH: Multi-Head Attention as Mixture-of-Head Attention", section 4.3:
language models of 186M and 881M parameters, where models with 75 % and 50 % of the heads on do as
well as the dense one. The forms of routing are in `jaxheads.edits.route`, the tokenizer and the
random start in `jaxheads.methods.from_scratch`.

Two controls are trained from the same start, for as many steps on the same batches: the dense
model, and random routing, where the heads of each token are drawn and not chosen. What came out is
in docs/methods.md.

The gates are those of the released code, which start at 1 as the dense model's. The paper's
"two_stage" gates sum to 1 over all heads, not to their number: the same weights then write a
fraction of what they write in the dense model, which changes training whatever the router does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax

from jaxheads.methods.fine_tuning import Rest
from jaxheads.methods.from_scratch import FromScratch, Shape
from jaxheads.methods.method import TextData, Tuned
from jaxheads.methods.moh import Routed, examine_routing
from jaxheads.methods.objective import rows_of
from jaxheads.methods.variants import fit_variants, routed_loss
from jaxheads.model.transformer import Transformer

if TYPE_CHECKING:
    from jaxheads.text import Tokenizer
    from jaxheads.train.job import Job


@dataclass(frozen=True)
class MohFromScratch(FromScratch):
    """Settings: those of `FromScratch`, and how heads are routed.

    Attributes:
      shape: of the model; 8 heads, so that a share of 0.75 or 0.5 is exact in every layer.
      routing: which heads stay on, and how they are chosen.
      controls: whether the dense model and random routing are trained too.
    """

    shape: Shape = field(default_factory=lambda: Shape(n_heads=8))
    routing: Routed = field(default_factory=Routed)
    controls: bool = True

    def train(
        self, job: Job, model: Transformer, tokenizer: Any, data: TextData
    ) -> dict[str, Tuned]:
        """Trains every parameter of what `create` made, with each share and as the controls.

        Returns:
          "moh 0.75", ...; with controls "dense" and "random 0.75", ...

        Raises:
          ValueError: shares that the model's heads do not allow.
        """
        # Not the key of which the parameters were drawn.
        key = jax.random.fold_in(jax.random.key(job.seed), 1)
        return fit_variants(
            job,
            routed_loss,
            model.params,
            self.routing.variants(model.config, key, controls=self.controls),
            rest=Rest({}, model.config, self.remat, self.chunk, self.z_loss),
            penalty=self.routing.penalty,
            fit=self.fit,
            rows=rows_of(data),
        )

    def examine(
        self, model: Transformer, tokenizer: Tokenizer, data: TextData, tuned: Tuned
    ) -> dict[str, Any]:
        """What the router does on held-out rows, as JSON; see `jaxheads.routing.examine`."""
        return examine_routing(model, tokenizer, data, tuned)
