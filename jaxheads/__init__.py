"""jaxheads: the heads of a transformer as ordinary JAX values.

A pretrained model is one pure function, `output = model(tokens, edits=..., taps=...)`.
"""

from jaxheads.convert import export, load, load_model, save
from jaxheads.decode import Generated, generate
from jaxheads.edits import (
    Affine,
    AttendTo,
    Chain,
    Edits,
    Gated,
    Mix,
    Project,
    attend_to,
    clamp_neurons,
    head_mask,
    mask_heads,
    offset_heads,
    project_out,
    scale_heads,
    set_activation,
    steer,
)
from jaxheads.edits.fold import fold, unfoldable
from jaxheads.embeddings import sentence_embeddings
from jaxheads.metrics import (
    answer_scores,
    last_logits,
    logit_difference,
    next_token_loss,
    perplexity,
)
from jaxheads.model import (
    Batch,
    Clip,
    Context,
    EncoderDecoder,
    KVCache,
    ModelConfig,
    Output,
    Tap,
    Transformer,
    pack,
)
from jaxheads.sites import SITES
from jaxheads.sweep import (
    AnswerLoss,
    Divergence,
    LogitDifference,
    Metric,
    NamedArray,
    Probability,
    Rank,
    TokenLoss,
    ablate_heads,
    patch,
    sweep,
)
from jaxheads.taps import head_norm, last_token, mean_activation, token_sum

__version__ = "0.1.0"

__all__ = [
    "SITES",
    "Affine",
    "AnswerLoss",
    "AttendTo",
    "Batch",
    "Chain",
    "Clip",
    "Context",
    "Divergence",
    "Edits",
    "EncoderDecoder",
    "Gated",
    "Generated",
    "KVCache",
    "LogitDifference",
    "Metric",
    "Mix",
    "ModelConfig",
    "NamedArray",
    "Output",
    "Probability",
    "Project",
    "Rank",
    "Tap",
    "TokenLoss",
    "Transformer",
    "ablate_heads",
    "answer_scores",
    "attend_to",
    "clamp_neurons",
    "export",
    "fold",
    "generate",
    "head_mask",
    "head_norm",
    "last_logits",
    "last_token",
    "load",
    "load_model",
    "logit_difference",
    "mask_heads",
    "mean_activation",
    "next_token_loss",
    "offset_heads",
    "pack",
    "patch",
    "perplexity",
    "project_out",
    "save",
    "scale_heads",
    "sentence_embeddings",
    "set_activation",
    "steer",
    "sweep",
    "token_sum",
    "unfoldable",
]
