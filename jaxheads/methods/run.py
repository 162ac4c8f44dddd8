"""A whole run of a method in a folder: data, training, controls, held-out results.

Writes config.json, metrics.jsonl, checkpoints/, edits.safetensors, model/ or beside.safetensors
(what was trained), scores.json (by which heads were chosen), examination.json (what a method looked
at besides) and, last, results.json. A run that was interrupted goes on from its newest checkpoints.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxheads.convert.native import save as save_model
from jaxheads.convert.place import Placement
from jaxheads.data import Rows, Source
from jaxheads.files import write_json
from jaxheads.methods.data import DataSettings, encode_splits, open_splits
from jaxheads.methods.fine_tuning import Rest
from jaxheads.methods.measure import apply, measure, readable
from jaxheads.methods.method import Data, ImageData, TaskData, Tuned
from jaxheads.methods.registry import find_method, name_of
from jaxheads.model import ModelConfig, Transformer
from jaxheads.model.batch import Batch
from jaxheads.model.config import DTYPES
from jaxheads.model.parameters import flatten
from jaxheads.names import choose
from jaxheads.text import Tokenizer
from jaxheads.train.config import read_config
from jaxheads.train.fit import Fit
from jaxheads.train.job import Job
from jaxheads.train.loop import Interrupts, Loop, OnStep
from jaxheads.train.mesh import Mesh, check_fit, make_mesh
from jaxheads.train.meter import Meter, model_flops
from jaxheads.train.rules import parse_rules, placement
from jaxheads.train.workdir import read_json
from jaxheads.train.writers import Writer

T = TypeVar("T")
RESULTS, SCORES, EDITS, MODEL = "results.json", "scores.json", "edits.safetensors", "model"
EXAMINATION, BESIDE = "examination.json", "beside.safetensors"
FROZEN = "frozen"
"""The name of the unchanged model among the variants."""

Load = Callable[[Placement | None], tuple[Transformer, Tokenizer]]
"""From where parameters go to a model and its tokenizer."""


@dataclass(frozen=True)
class Run:
    """Everything that decides a run.

    Attributes:
      model: name or path.
      dtype: of parameters and activations.
      seed: of the examples, their order, the initial values and the random heads.
      method: settings of the method, a dataclass that `find_method` returns.
      data: what is learned.
      neighbours: further sources, such as "task:true_capitals", on which no variant was trained
        but all are measured.
      loop: checkpoints, evaluations, logs.
      mesh: the devices.
      sharding: rules in front of the default ones, e.g. {"my_edit/kernel" = "-, tensor"}.
      log: besides metrics.jsonl: "tensorboard", "wandb".
    """

    method: Any
    model: str = "smollm2-135m-instruct"
    dtype: str = "float32"
    seed: int = 0
    data: DataSettings = field(default_factory=DataSettings)
    neighbours: tuple[str, ...] = ()
    loop: Loop = field(default_factory=Loop)
    mesh: Mesh = field(default_factory=Mesh)
    sharding: dict[str, str] = field(default_factory=dict)
    log: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        choose("dtype", self.dtype, DTYPES)
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")

    def to_json(self) -> dict[str, Any]:
        """What identifies the run, as JSON holds it: the devices and the logs do not."""
        raw: dict[str, Any] = dataclasses.asdict(self)
        raw["method"] = {"name": name_of(self.method)} | raw["method"]
        for name in ("mesh", "sharding", "log"):
            del raw[name]
        plain: dict[str, Any] = _plain(raw)
        return plain


def read_run(path: str | Path, *, runlocal: bool = False) -> Run:
    """Reads the settings of a run from a TOML file whose table [method] names its method.

    Raises:
      FileNotFoundError, ValueError: as `read_config`; an unknown method or none.
    """

    def schema(raw: dict[str, Any]) -> type[Run]:
        table = raw.get("method")
        if not isinstance(table, dict) or "name" not in table:
            raise ValueError('a table [method] with a name is missing, such as name = "lofit"')
        return run_type(table.pop("name"))

    return read_config(path, schema, runlocal=runlocal)


def run_type(method: str) -> type[Run]:
    """`Run` with the settings of a method as the type of its field, for parsers.

    Raises:
      ValueError: there is no such method.
    """
    kind = find_method(method)
    typed = ("method", kind, dataclasses.field(default_factory=kind))
    made = dataclasses.make_dataclass("Run", [typed], bases=(Run,), frozen=True)
    made.__doc__ = Run.__doc__
    return made


@dataclass(frozen=True)
class Prepared:
    """A run with its model and data, before training."""

    model: Transformer
    tokenizer: Tokenizer | None
    data: Data
    neighbours: Mapping[str, Data]


def check(run: Run) -> jax.sharding.Mesh | None:
    """The mesh of a run, after checking every stage's batches against it.

    Raises:
      ValueError: the mesh does not fit the devices, or a batch the mesh.
    """
    return mesh_for(run, jax.devices())


def mesh_for(run: Run, devices: Sequence[Any]) -> jax.sharding.Mesh | None:
    """As `check`, for devices that may be elsewhere."""
    mesh = make_mesh(run.mesh, devices)
    for fit in _fits(run.method):
        check_fit(mesh, batch_size=fit.batch_size, accumulate=fit.accumulate)
    return mesh


def make_job(
    run: Run,
    mesh: jax.sharding.Mesh | None,
    workdir: Path | None,
    *,
    writers: Sequence[Writer] = (),
    signals: Interrupts | None = None,
    on_step: OnStep = lambda report: None,
    on_note: Callable[[str], None] = warnings.warn,
) -> Job:
    """The devices, the folder and the loop of a run."""
    return Job(
        seed=run.seed,
        mesh=mesh,
        rules=parse_rules(run.sharding),
        loop=run.loop,
        folder=workdir,
        config=run.to_json(),
        writers=writers,
        signals=signals,
        on_step=on_step,
        on_note=on_note,
        meter=_meter,
    )


def prepare_run(run: Run, load: Load, mesh: jax.sharding.Mesh | None = None) -> Prepared:
    """Opens the data, then loads the model: mistakes in the data show at once.

    Args:
      run: the settings.
      load: gives model and tokenizer; not called by a method that makes its own.
      mesh: over which the model's parameters are divided as they are read.

    Raises:
      ValueError: as `open_splits`, `check_kinds` and `encode_splits`; rows longer than the
        model's context.
    """
    splits = open_splits(run.data, run.seed)
    more = {name: dataclasses.replace(run.data, source=name, options={}) for name in run.neighbours}
    opened = {name: open_splits(settings, run.seed) for name, settings in more.items()}
    check_kinds(run.method, [splits, *opened.values()])
    if hasattr(run.method, "create"):
        model, tokenizer = run.method.create(splits[0], run.seed)
    else:
        where = None if mesh is None else placement(mesh, parse_rules(run.sharding))
        model, tokenizer = load(where)
    data = encode_splits(run.data, splits, tokenizer)
    neighbours = {
        name: encode_splits(dataclasses.replace(more[name], length=None), sides, tokenizer)
        for name, sides in opened.items()
    }
    for name, found in {run.data.source: data, **neighbours}.items():
        _check_length(name, found, model.config)
    return Prepared(model, tokenizer, data, neighbours)


def check_kinds(method: Any, opened: Iterable[tuple[Source, Source]]) -> None:
    """Refuses images for a method that changes a model that was loaded: a language model.

    What a method that makes its own model can use, its `create` says.

    Raises:
      ValueError: such a method and a source of images.
    """
    if hasattr(method, "create"):
        return
    for source, _ in opened:
        if source.kind == "images":
            raise ValueError(
                f"{source.name} holds images, expected texts or prompts with answers: the method "
                f"{name_of(method)!r} changes a language model"
            )


def train(
    run: Run,
    ready: Prepared,
    job: Job,
    workdir: Path,
    home: Any = None,
    *,
    on_measure: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Trains, measures and writes the results.

    Args:
      run: the settings.
      ready: as `prepare_run` gives it.
      job: the devices and the loop, with the folder of the run.
      workdir: the folder in which files are written.
      home: where a whole model goes, if not there: an address that all processes reach.
      on_measure: called with the name of each variant before it is measured.

    Returns:
      What results.json holds: "method"; "examples", train and held out; "variants", by name
      "frozen" (the model as it was), the method's own and its controls, each with "held_out",
      "neighbours", "trained" (scalars) and "heads"; "seconds" of training; "environment".

    Raises:
      ValueError: settings that do not fit the model.
      NotFinite, Interrupted: as `Job.fit`.
    """
    begin = time.perf_counter()
    tuned = dict(run.method.train(job, ready.model, ready.tokenizer, ready.data))
    seconds = time.perf_counter() - begin
    main = next(iter(tuned))
    measured = getattr(run.method, "measure", measure)
    variants = {}
    for name, variant in {FROZEN: Tuned(), **tuned}.items():
        on_measure(name)
        variants[name] = {
            "held_out": measured(job, ready.model, ready.data, variant),
            "neighbours": {
                neighbour: measured(job, ready.model, data, variant)
                for neighbour, data in ready.neighbours.items()
            },
            "trained": variant.trained,
            "heads": None if variant.heads is None else [list(map(int, h)) for h in variant.heads],
        }
    results = {
        "method": name_of(run.method),
        "main": main,
        "examples": _sizes(ready.data),
        "variants": variants,
        "seconds": seconds,
        "environment": _environment(),
    }
    _write(workdir, tuned[main], ready, workdir if home is None else home)
    examined = None
    if hasattr(run.method, "examine"):
        examined = run.method.examine(
            ready.model, ready.tokenizer, ready.data, readable(tuned[main])
        )
    if jax.process_index() == 0:
        if examined is not None:
            write_json(workdir / EXAMINATION, examined)
        write_json(workdir / RESULTS, results)
    return results


def finished(workdir: Path) -> dict[str, Any] | None:
    """The results, if the run is already complete in the folder."""
    path = workdir / RESULTS
    return read_json(path) if path.is_file() else None


def result_rows(results: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Rows (variant, trained scalars, held-out metrics ..., neighbours' losses ...)."""
    rows = []
    for name, row in results["variants"].items():
        near = [found["loss"] for found in row["neighbours"].values()]
        rows.append((name, row["trained"], *row["held_out"].values(), *near))
    return rows


def result_columns(results: Mapping[str, Any]) -> tuple[str, ...]:
    """Headings of `result_rows`."""
    frozen = results["variants"][FROZEN]
    metrics = [name.replace("_", " ") for name in frozen["held_out"]]
    return ("variant", "trained", *metrics, *(f"{name} loss" for name in frozen["neighbours"]))


def _write(workdir: Path, tuned: Tuned, ready: Prepared, home: Any) -> None:
    """What was trained, for `jaxheads export`, `eval` and `load`.

    All processes call it: each has only its own part of an array that is divided over them.
    """
    edits, first = None if tuned.edits is None else readable(tuned.edits), jax.process_index() == 0
    if edits is not None and first:
        edits.save(workdir / EDITS)
    if tuned.params is not None or tuned.model is not None:
        # A run that was killed before it had its results may have written it.
        save_model(apply(ready.model, tuned), ready.tokenizer, home / MODEL, overwrite=True)
    if tuned.beside is not None:
        leaves = {path: np.asarray(leaf) for path, leaf in flatten(readable(tuned.beside))}
        if first:
            partial = workdir / f".{BESIDE}.partial"
            save_file(leaves, partial)
            partial.replace(workdir / BESIDE)
    if tuned.scores is not None and first:
        scores = np.asarray(tuned.scores).tolist()
        write_json(workdir / SCORES, {"axes": ["layer", "head"], "values": scores})


def _fits(settings: Any) -> Iterator[Fit]:
    """All stages that a method's settings speak of."""
    if isinstance(settings, Fit):
        yield settings
    elif dataclasses.is_dataclass(settings):
        for one in dataclasses.fields(settings):
            yield from _fits(getattr(settings, one.name))


def _meter(trainable: Any, frozen: Any, rows: Rows, batch_size: int) -> Meter:
    """Tokens and FLOPs of a step, where what is trained or frozen has the config of a model."""
    item = rows[np.zeros(1, int)]
    batch = next((part for part in _parts(item, Batch)), None)
    if batch is None:
        return Meter()
    length = batch.tokens.shape[1]
    model = next((part for part in _parts(frozen, Transformer)), None)
    rest = next((part for part in _parts(frozen, Rest)), None)
    flops = None
    if model is not None:
        flops = model_flops(model.config, batch_size, length, trained="edits")
    elif rest is not None:
        flops = model_flops(rest.config, batch_size, length, trained="parameters")
    return Meter(tokens=batch_size * length, flops=flops)


def _parts(tree: Any, kind: type[T]) -> list[T]:
    """The nodes of a pytree that are of a class."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def _sizes(data: Data) -> dict[str, int]:
    return {"train": len(data.train), "held_out": len(data.held_out)}


def _check_length(name: str, data: Data, config: ModelConfig) -> None:
    if isinstance(data, ImageData):
        return
    batch: Any = data.train_batch if isinstance(data, TaskData) else data.train[np.arange(1)]
    length = batch.tokens.shape[1]
    if config.context_length and length > config.context_length:
        raise ValueError(
            f"{name}: rows of {length} tokens are longer than the context of the model, "
            f"{config.context_length}"
        )


def _environment() -> dict[str, str]:
    import jaxheads

    versions = {"jaxheads": jaxheads.__version__, "jax": jax.__version__, "numpy": np.__version__}
    return versions | {"device": jax.devices()[0].device_kind, "devices": str(jax.device_count())}


def _plain(value: Any) -> Any:
    """Tuples as lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
