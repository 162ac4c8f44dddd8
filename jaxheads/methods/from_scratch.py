"""A small language model from scratch: its tokenizer, its random start, its training.

The tokenizer is byte-level BPE (Sennrich et al. 2016; on bytes as in Radford et al. 2019), learned
from the training texts, or that of another model. The model is of the Llama family: pre-norm with
RMS norms, rotary positions, gated MLP, tied embeddings. A small multiple of the squared log of the
softmax's normaliser keeps logits from drifting (Chowdhery et al. 2022, PaLM, section 5: 1e-4).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxheads.convert.load import find_model
from jaxheads.methods.fine_tuning import Rest, parameters_loss
from jaxheads.methods.method import TextData, Tuned
from jaxheads.methods.objective import rows_of
from jaxheads.model.config import DTYPES, ModelConfig
from jaxheads.model.layout import REMAT
from jaxheads.model.transformer import Transformer
from jaxheads.names import choose
from jaxheads.text import Tokenizer
from jaxheads.train.fit import Fit
from jaxheads.train.optimizer import Optimizer

if TYPE_CHECKING:
    from jaxheads.train.job import Job

NAME = "from scratch"
END = "<|end|>"
"""The token between texts."""
BYTES = 256


@dataclass(frozen=True)
class Shape:
    """The shape of the model; its vocabulary is the tokenizer's.

    Attributes:
      n_layers: L, blocks.
      n_heads: H, query heads.
      n_kv_heads: K, key/value heads; None for one per query head.
      head_dim: Dh; None for d_model / n_heads.
      d_model: D, width of the residual stream.
      d_mlp: F, hidden width of the MLP.
      context_length: longest sequence, in tokens.
      tied: whether the unembedding is the embedding.
    """

    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = None
    head_dim: int | None = None
    d_model: int = 128
    d_mlp: int = 352
    context_length: int = 256
    tied: bool = True

    def config(self, vocab_size: int) -> ModelConfig:
        """The config of a model with this vocabulary.

        Raises:
          ValueError: sizes that do not fit together.
        """
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}: give head_dim"
            )
        return ModelConfig(
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads or self.n_heads,
            head_dim=self.head_dim or self.d_model // self.n_heads,
            d_model=self.d_model,
            d_mlp=self.d_mlp,
            vocab_size=vocab_size,
            context_length=self.context_length,
            tied=self.tied,
        )


@dataclass(frozen=True)
class FromScratch:
    """Settings.

    Attributes:
      shape: of the model.
      vocabulary: tokens of the tokenizer that is learned from the texts.
      tokenizer: name of a model whose tokenizer is taken instead; None to learn one.
      compute: dtype of the activations; parameters are float32.
      z_loss: weight of the squared log of the normaliser.
      remat: what blocks keep for the backward pass, as in `Transformer`.
      chunk: tokens of a row unembedded at a time; None for all.
      fit: how the model is trained.

    Raises:
      ValueError: an unknown `compute` or `remat`, a vocabulary that cannot hold all bytes.
    """

    shape: Shape = field(default_factory=Shape)
    vocabulary: int = 2048
    tokenizer: str | None = None
    compute: str = "float32"
    z_loss: float = 1e-4
    remat: str = "none"
    chunk: int | None = None
    fit: Fit = field(
        default_factory=lambda: Fit(
            steps=600,
            batch_size=16,
            optimizer=Optimizer(
                learning_rate=3e-3, schedule="cosine", warmup=30, end=0.1, weight_decay=0.1,
                clip=1.0, b2=0.95,
            ),
        )
    )  # fmt: skip

    def __post_init__(self) -> None:
        choose("remat", self.remat, REMAT)
        choose("compute", self.compute, DTYPES)
        if self.vocabulary <= BYTES:
            raise ValueError(
                f"vocabulary must be more than {BYTES}, one token for each byte and one that "
                f"ends a text, got {self.vocabulary}"
            )

    def create(self, texts: Iterable[Any], seed: int) -> tuple[Transformer, Tokenizer]:
        """The random model that training starts from, and its tokenizer.

        Args:
          texts: training texts, from which the tokenizer is learned.
          seed: of the parameters.

        Raises:
          ValueError: as `find_tokenizer`, `learn_tokenizer` and `Shape.config`; what is no text.
        """
        texts = list(texts)
        if other := next((one for one in texts if not isinstance(one, str)), None):
            raise ValueError(f"a language model is made from texts, got {type(other).__name__}")
        if self.tokenizer is None:
            tokenizer = learn_tokenizer(texts, self.vocabulary)
        else:
            tokenizer = find_tokenizer(self.tokenizer)
        config = self.shape.config(tokenizer.vocab_size).replace(dtype=self.compute)
        return Transformer.random(config, jax.random.key(seed)), tokenizer

    def train(
        self, job: Job, model: Transformer, tokenizer: Any, data: TextData
    ) -> dict[str, Tuned]:
        """Trains every parameter of what `create` made, on packed text."""
        rest = Rest({}, model.config, self.remat, self.chunk, self.z_loss)
        trained = job.fit(NAME, parameters_loss, model.params, rest, fit=self.fit, **rows_of(data))
        count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
        return {NAME: Tuned(params=trained, trained=count)}


def find_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model, by the model's name or path as `jaxheads.load` takes it.

    Raises:
      ValueError, FileNotFoundError: there is no such model, or no tokenizer with it.
    """
    path, kind = find_model(name, None, None)
    return Tokenizer.from_gguf(path) if kind == "gguf" else Tokenizer.from_file(path)


def learn_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE learned from texts; the same texts in the same order give the same tokens.

    Any text can be encoded: all 256 bytes are tokens. The token `END` ends a text ("eos_token")
    and pads.

    Args:
      texts: what to learn from.
      vocabulary: tokens wanted in all; fewer if the texts hold no more pairs to join.

    Raises:
      ValueError: no text, or a vocabulary that cannot hold all bytes and `END`.
    """
    if vocabulary <= BYTES:
        raise ValueError(f"vocabulary must be more than {BYTES}, got {vocabulary}")
    held: Sequence[str] = [text for text in texts if text]
    if not held:
        raise ValueError("no text to learn a tokenizer from")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(held, trainer, length=len(held))
    return Tokenizer(backend, {"eos_token": END, "pad_token": END})
