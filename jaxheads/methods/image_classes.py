"""A small vision transformer that classifies images, dense and with mixture-of-head attention.

Source: Dosovitskiy et al. (2021), "An Image is Worth 16x16 Words": patches and a class token
through a pre-norm encoder, a linear classifier of the class token. Jin et al. (2024), "MoH:
Multi-Head Attention as Mixture-of-Head Attention", section 4.1 and the released ViT code: routers
trained with the model from the start, with renormalised gates and load-balance weight 0.01, and
shallow layers in which all heads are always on (`whole_layers`). The paper's backbone is TransNeXt
on ImageNet-1K, where 75 % of the heads reach 84.9 % and 50 % reach 84.7 %, against 84.8 % for all.

A layer with K = 1 has renormalised gates of 1, so that the task teaches its router nothing: choose
shared heads and whole layers such that two or more are routed.

Every variant begins with the same parameters and sees the same batches for as many steps: the
routed models, the dense one, and models whose heads are drawn at random for each token.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxheads.data import Source
from jaxheads.edits import Edits, Route, mixture_of_heads
from jaxheads.methods.image_loss import Setup, class_scores, image_loss
from jaxheads.methods.measure import apply, readable
from jaxheads.methods.method import ImageData, Tuned
from jaxheads.methods.moh import Routed, weights_of
from jaxheads.methods.objective import rows_of
from jaxheads.model.config import Image, ModelConfig
from jaxheads.model.layout import whole
from jaxheads.model.transformer import Transformer
from jaxheads.train.fit import Fit
from jaxheads.train.optimizer import Optimizer

if TYPE_CHECKING:
    from jaxheads.train.job import Job

Array = jax.Array


@dataclass(frozen=True)
class Shape:
    """The shape of the model; image size and classes are those of the data.

    Attributes:
      n_layers: L, blocks.
      n_heads: H, heads of a block.
      d_model: D, width of the residual stream.
      d_mlp: F, hidden width of the MLP.
      patch: pixels along the side of a patch.

    Raises:
      ValueError: a width that heads do not divide.
    """

    n_layers: int = 5
    n_heads: int = 8
    d_model: int = 64
    d_mlp: int = 128
    patch: int = 2

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            if getattr(self, one.name) < 1:
                raise ValueError(f"{one.name} must be at least 1, got {getattr(self, one.name)}")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}")

    def config(self, size: tuple[int, ...], classes: int) -> ModelConfig:
        """The config of a ViT for images of this size: height, width and channels.

        Raises:
          ValueError: an image that is not cut evenly into patches.
        """
        height, width, channels = size
        image = Image(height, width, self.patch, channels)
        return ModelConfig(
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads,
            head_dim=self.d_model // self.n_heads,
            d_model=self.d_model,
            d_mlp=self.d_mlp,
            vocab_size=classes,
            context_length=image.tokens,
            n_positions=image.tokens,
            family="vit",
            causal=False,
            ropes=(None,),
            norm="layer",
            norm_bias=True,
            norm_eps=1e-6,
            qkv_bias=True,
            o_bias=True,
            activation="gelu",
            gated=False,
            mlp_bias=True,
            image=image,
            head="classes",
            tied=False,
            unembed_bias=True,
        )


@dataclass(frozen=True)
class ImageClasses:
    """Settings.

    Attributes:
      shape: of the model.
      routing: which heads stay on, and how they are chosen.
      whole_layers: how many of the first layers keep all heads; the others keep fewer, so that
        the mean over layers is the share.
      controls: whether the dense model and random routing are trained too.
      shift: most pixels by which a training image is shifted, at random, in each direction.
      fit: how all are trained.

    Raises:
      ValueError: shares that the layers do not allow, a negative shift.
    """

    shape: Shape = field(default_factory=Shape)
    routing: Routed = field(default_factory=lambda: Routed(shared=0.35))
    whole_layers: int = 1
    controls: bool = True
    shift: int = 0
    fit: Fit = field(
        default_factory=lambda: Fit(
            steps=200,
            batch_size=64,
            optimizer=Optimizer(
                learning_rate=4e-3, schedule="cosine", warmup=20, end=0.01, weight_decay=0.05,
                clip=1.0,
            ),
        )
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ValueError(f"shift must be at least 0 pixels, got {self.shift}")
        for share in self.routing.shares:
            heads_on(self.shape.n_layers, self.shape.n_heads, share, self.whole_layers)

    def create(self, source: Source, seed: int) -> tuple[Transformer, None]:
        """The random model that training starts from; it has no tokenizer.

        Args:
          source: training images, by which image size and number of classes are known.
          seed: of the parameters.

        Raises:
          ValueError: a source of something else, images that are not cut evenly into patches.
        """
        images, labels = source.images()
        config = self.shape.config(images.shape[1:], classes=1 + int(labels.max()))
        return Transformer.random(config, jax.random.key(seed)), None

    def train(
        self, job: Job, model: Transformer, tokenizer: None, data: ImageData
    ) -> dict[str, Tuned]:
        """Trains the shares and the controls.

        Returns:
          "moh 0.75", ...; with controls "dense" and "random 0.75", ....
        """
        # Not the key of which the parameters were drawn.
        key = jax.random.fold_in(jax.random.key(job.seed), 1)
        routes: dict[str, Route | None] = {
            f"moh {share:g}": self.route(model.config, self.routing, share, key)
            for share in self.routing.shares
        }
        if self.controls:
            drawn = dataclasses.replace(self.routing, scores="random")
            routes["dense"] = None
            for share in self.routing.shares:
                routes[f"random {share:g}"] = self.route(model.config, drawn, share, key)
        return {name: self._fit(job, name, model, data, route) for name, route in routes.items()}

    def route(self, config: ModelConfig, routing: Routed, share: float, key: Array) -> Route:
        """A new router for a model, with its whole layers.

        Args:
          config: of the model.
          routing: its form.
          share: mean share of heads that stay on.
          key: of its weights, or of its draws.
        """
        counts = heads_on(config.n_layers, config.n_heads, share, self.whole_layers)
        shared = (routing.shared * counts + 0.5).astype(int)
        # Nothing is left to choose in a whole layer.
        shared[: self.whole_layers] = config.n_heads
        edits = mixture_of_heads(
            config,
            key,
            shared=shared.tolist(),
            top_k=(counts - shared).tolist(),
            gates=routing.gates,
            scores=routing.scores,
        )
        route: Route = edits["z"]  # type: ignore[assignment]
        return route

    def _fit(
        self, job: Job, name: str, model: Transformer, data: ImageData, route: Route | None
    ) -> Tuned:
        """Trains all parameters, and the router if there is one, as a stage of a job."""
        weights = {} if route is None else weights_of(route)
        trainable = {"params": model.params, "route": weights}
        frozen = Setup(
            route=None
            if route is None
            else dataclasses.replace(route, router=None, shared_router=None, balance=None),
            penalty=None if route is None else self.routing.penalty,
            config=model.config,
            shift=self.shift,
        )
        trained = job.fit(name, image_loss, trainable, frozen, fit=self.fit, **rows_of(data))
        edits = None if route is None else Edits(z=dataclasses.replace(route, **trained["route"]))
        count = sum(leaf.size for leaf in jax.tree.leaves(trainable))
        return Tuned(edits=edits, params=trained["params"], trained=count)

    def measure(
        self,
        job: Job,
        model: Transformer,
        data: ImageData,
        tuned: Tuned,
        batch_size: int = 128,
    ) -> dict[str, float]:
        """Means over the held-out images.

        Args:
          job: the devices.
          model: the model before training.
          data: whose held-out side is measured.
          tuned: what was changed.
          batch_size: images at a time, a multiple of what the mesh divides rows by.

        Returns:
          "loss", nats per image, and "accuracy", the share of images whose class is the most
          likely one.
        """
        rows, (host, hosts) = len(data.held_out), job.slice
        share = batch_size // hosts
        parts = []
        with job.devices():
            changed, edits = job.place(apply(model, tuned)), job.place(tuned.edits)
            for first in range(0, rows, batch_size):
                # The last part repeats the last image, so that all have one shape.
                taken = np.minimum(np.arange(first, first + batch_size), rows - 1)
                item = data.held_out[taken[host * share : (host + 1) * share]]
                found = readable(_scores(changed, *job.send(item), edits))
                parts.append(jax.tree.map(lambda leaf, n=rows - first: leaf[:n], found))
        loss, right = (np.concatenate(part) for part in zip(*jax.device_get(parts), strict=True))
        return {"loss": float(loss.mean()), "accuracy": float(right.mean())}


def heads_on(n_layers: int, n_heads: int, share: float, whole_layers: int = 0) -> np.ndarray:
    """How many heads stay on in each layer, int [L].

    The first layers keep all; the others differ by at most one, and the mean over all layers is
    as near to the share as it can be.

    Args:
      n_layers: L.
      n_heads: H.
      share: mean share of heads that stay on, in (0, 1].
      whole_layers: how many of the first layers keep all.

    Raises:
      ValueError: more whole layers than layers, none that is routed though the share is below
        1, or a share that leaves some layer without a head.
    """
    if not 0 <= whole_layers <= n_layers:
        raise ValueError(f"whole_layers must lie in 0..{n_layers}, got {whole_layers}")
    routed = n_layers - whole_layers
    left = share * n_heads * n_layers - n_heads * whole_layers
    if (routed == 0 and share < 1) or left < routed:
        raise ValueError(
            f"share {share:g} of {n_layers} layers of {n_heads} heads, of which {whole_layers} "
            f"keep all, leaves {max(left, 0):g} heads for the {routed} others"
        )
    ends = np.floor(np.arange(1, routed + 1) * (left / max(routed, 1)) + 0.5).astype(int)
    return np.concatenate([np.full(whole_layers, n_heads), np.diff(ends, prepend=0)])


@jax.jit
def _scores(
    model: Transformer, images: Array, labels: Array, edits: Edits | None
) -> tuple[Array, Array]:
    found = class_scores(model(images, edits=edits), labels)
    loss, right = (whole(values, 0) for values in found)
    return loss, right
