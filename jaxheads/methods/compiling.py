"""What a run would cost on devices that are not there: its first stage, compiled ahead of time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxheads.convert.load import load_config
from jaxheads.data import Rows
from jaxheads.methods.data import encode_splits, open_splits
from jaxheads.methods.run import Run, check_kinds, make_job, mesh_for
from jaxheads.model.parameters import nest, parameter_table
from jaxheads.model.transformer import Transformer
from jaxheads.train.fit import Fit
from jaxheads.train.job import Job
from jaxheads.train.rules import check_unsharded
from jaxheads.train.step import Loss, Step, make_step
from jaxheads.train.topology import Topology, abstract, abstract_state, compile_for, report


class _Reached(Exception):
    """Carries the first stage's step and its arguments out of the method, which ends here."""

    def __init__(self, stage: str, step: Step, *arguments: Any) -> None:
        super().__init__()
        self.stage, self.step, self.arguments = stage, step, arguments


@dataclass(frozen=True)
class CompilingJob(Job):
    """A job that ends before the first step of its first stage."""

    def fit(
        self,
        name: str,
        loss: Loss,
        trainable: Any,
        frozen: Any,
        rows: Rows,
        fit: Fit,
        *,
        mask: Any = None,
        **_: Any,
    ) -> Any:
        """Leaves the method by an exception."""
        optimizer = fit.optimizer.build(fit.steps, mask)
        average = fit.average is not None
        state = abstract_state(trainable, optimizer, self.mesh, self.rules, average=average)
        frozen = abstract(frozen, self.mesh, self.rules)
        if self.mesh is not None:
            divided = jax.tree.map(lambda leaf: leaf.sharding, (state, frozen))
            check_unsharded((state, frozen), divided, rules=self.rules)
        # Only its shapes count: a batch may be larger than the data at hand.
        batch = rows[np.zeros(fit.batch_size, int)]
        step = make_step(
            loss, optimizer, seed=self.seed, accumulate=fit.accumulate, average=fit.average
        )
        raise _Reached(name, step, state, frozen, self.shapes(batch))


def compile_run(run: Run, topology: str | None) -> dict[str, Any]:
    """Compiles one step of the first stage of a run.

    No weights are read and no arrays are made: the model is known by its config only.

    Args:
      run: the settings.
      topology: devices to compile for, as `Topology.parse` reads them; None for those at hand.

    Returns:
      What `jaxheads.train.topology.report` says of the step, for one device, and "stage".

    Raises:
      ValueError: a topology that cannot be compiled for here, settings that do not fit it, or
        a method that computes with the model before its first stage.
    """
    devices = jax.devices() if topology is None else Topology.parse(topology).devices()
    mesh = mesh_for(run, devices)
    splits = open_splits(run.data, run.seed)
    check_kinds(run.method, [splits])
    made: Any = None
    if hasattr(run.method, "create"):
        made, tokenizer = jax.eval_shape(_Hidden(run, splits[0]))
        tokenizer = tokenizer.value
    else:
        config, tokenizer = load_config(run.model, run.dtype)
        made = _abstract_model(config, run.dtype)
    data = encode_splits(run.data, splits, tokenizer)
    job = make_job(run, mesh, None)
    shared = {field.name: getattr(job, field.name) for field in dataclasses.fields(Job)}
    compiling = CompilingJob(**shared)
    try:
        jax.eval_shape(lambda model: run.method.train(compiling, model, tokenizer, data), made)
    except _Reached as stage:
        compiled = compile_for(stage.step, *stage.arguments, mesh=mesh, device=devices[0])
        return {"stage": stage.stage} | report(compiled)
    except jax.errors.JAXTypeError as error:
        raise ValueError(
            f"{type(run.method).__name__} computes with the model before it trains, so it cannot "
            "be compiled without running it"
        ) from error
    raise ValueError(f"{type(run.method).__name__} trains nothing, so there is nothing to compile")


class _Hidden:
    """The method's own model, with a tokenizer that passes through `jax.eval_shape`."""

    def __init__(self, run: Run, texts: Any) -> None:
        self._run, self._texts = run, texts

    def __call__(self) -> Any:
        model, tokenizer = self._run.method.create(self._texts, self._run.seed)
        return model, _Static(tokenizer)


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class _Static:
    value: Any


def _abstract_model(config: Any, dtype: str) -> Any:
    leaves = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype)
        for path, leaf in parameter_table(config).items()
    }
    return jax.eval_shape(lambda params: Transformer(config, params), nest(leaves))
