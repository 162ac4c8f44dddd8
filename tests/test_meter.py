"""Speed and FLOPs of a step, against the compiler's own count; profiles; writers; the bar."""

import importlib.util
import io
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData
from rich.console import Console

import jaxheads as jh
from jaxheads.cli.progress import describe, training_progress
from jaxheads.model.parameters import parameter_table
from jaxheads.train.loop import StepReport
from jaxheads.train.meter import Meter, Speed, model_flops, peak_flops
from jaxheads.train.profile import Profile, annotation
from jaxheads.train.writers import EXTRAS, check_writers, open_writers

pytestmark = pytest.mark.optimised

ROWS, LENGTH = 1, 256
# Wide enough that what is not a matrix product (norms, softmax) is a percent or two of the work,
# and of one layer: the compiler counts the body of a scan once.
CONFIG = jh.ModelConfig(
    n_layers=1, n_heads=6, n_kv_heads=2, head_dim=32, d_model=256, d_mlp=384, vocab_size=512,
    context_length=256,
)  # fmt: skip


def compiled_flops(trained):
    """The compiler's count of a step whose edit lies below everything."""
    params = jax.eval_shape(lambda: jh.Transformer.random(CONFIG, jax.random.key(0)).params)

    def loss(params, offset, tokens):
        edits = {"embed": jh.Affine(offset=offset)}
        return jnp.square(jh.Transformer(CONFIG, params)(tokens, edits=edits).logits).sum()

    argument = {"parameters": (0, 1), "edits": 1}.get(trained)
    step = loss if argument is None else jax.grad(loss, argument)
    offset = jax.ShapeDtypeStruct((1, 1, CONFIG.d_model), jnp.float32)
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    return jax.jit(step).lower(params, offset, tokens).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("trained", ["nothing", "edits", "parameters"])
def test_the_flops_on_paper_are_those_of_the_compiled_step(trained):
    paper = model_flops(CONFIG, ROWS, LENGTH, trained=trained)
    assert compiled_flops(trained) == pytest.approx(paper, rel=0.03)


def test_training_a_whole_model_is_palm_s_formula():
    config = CONFIG.replace(n_layers=3)
    size = parameter_table(config)
    matrices = sum(
        np.prod(p.shape) for path, p in size.items() if path.startswith("blocks/") and p.fan_in
    )
    weights = matrices + config.vocab_size * config.d_model  # the unembedding, tied or not
    for tied in (True, False):
        flops = model_flops(config.replace(tied=tied), 3, 50)
        attention = 12 * config.n_layers * config.n_heads * config.head_dim * 50
        assert flops == 3 * 50 * (6 * weights + attention)


def test_adapters_cost_three_products_beside_those_of_an_edit():
    edits = model_flops(CONFIG, 2, 10, trained="edits")
    assert model_flops(CONFIG, 2, 10, trained="edits", adapters=7) == edits + 6 * 7 * 20


def test_what_has_no_flops_on_paper_is_refused():
    with pytest.raises(ValueError, match=r"unknown trained 'edit'. Did you mean 'edits'"):
        model_flops(CONFIG, 1, 1, trained="edit")
    with pytest.raises(ValueError, match="cross-attention"):
        model_flops(CONFIG.replace(cross=True), 1, 1)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v4 lite", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_by_the_name_it_reports(kind, peak):
    assert peak_flops(kind) == peak


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_speed_leaves_out_compilation_and_pauses_and_time_left_does_not():
    clock = Clock()
    meter = Meter(tokens=1000, flops=197e12, devices=2, device_kind="TPU v5e", clock=clock)
    clock.now = 60  # compilation
    assert meter.told(1, 11) is None
    clock.now += 2
    expected = Speed(seconds=2, tokens_per_second=500, mfu=0.25, seconds_left=18)
    assert meter.told(2, 11) == expected
    clock.now += 10  # an evaluation
    meter.resume()
    clock.now += 3 * 2
    speed = meter.told(5, 11)
    assert (speed.seconds, speed.mfu) == (2, 0.25)
    assert speed.seconds_left == pytest.approx(6 * (2 + 10 + 6) / 4)


def test_what_is_not_known_is_not_shown():
    meter = Meter(tokens=None, flops=1e9, device_kind="cpu")
    meter.told(1, 3)
    speed = meter.told(2, 3)
    assert speed.mfu is None and speed.tokens_per_second is None
    report = StepReport("toy", 2, 3, {"loss": 1.0}, {"accuracy": 0.5}, speed)
    assert describe(report) == "loss 1 · accuracy 0.5 · 0:00 left"
    assert set(report.row()) == {"loss", "evaluation/accuracy", "seconds"}


# --- what is shown --------------------------------------------------------------------------


def report(step=120):
    speed = Speed(seconds=0.5, tokens_per_second=12345, mfu=0.412, seconds_left=3723)
    return StepReport("offsets", step, 400, {"loss": 0.31234}, {}, speed)


def test_a_line_tells_loss_speed_and_time_left():
    assert describe(report()) == "loss 0.3123 · 12.3k tokens/s · 41.2% MFU · 1:02:03 left"


def test_without_a_terminal_there_is_a_line_now_and_then(capsys):
    clock = Clock()
    with training_progress(clock) as show:
        for step in range(1, 71):
            clock.now += 1
            show(report(step))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" loss")[0] for line in lines] == ["offsets 30/400", "offsets 60/400"]


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    shown = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr("jaxheads.cli.progress.stderr", lambda: shown)
    with training_progress() as show:
        show(report())
    text = shown.file.getvalue()
    assert "offsets" in text and "120/400" in text and "41.2% MFU" in text


# --- where it goes --------------------------------------------------------------------------


def test_a_profile_holds_the_steps_of_its_window(tmp_path):
    step = jax.jit(lambda x: x @ x)
    value = jnp.eye(8)
    with Profile(tmp_path, (2, 4)) as profile:
        for index in range(6):
            profile.before(index)
            with annotation(index):
                value = step(value)
            profile.after(index, value)
    (file,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    events = [
        dict(event.stats)["step_num"]
        for plane in ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert sorted(events) == [2, 3]


def write(folder, names):
    """A killed and resumed run of two stages."""
    for resumed in (False, True):
        with open_writers(folder, names, config={"task": {"name": "toy"}}) as writers:
            for writer in writers:
                writer.rewind("offsets", 2 if resumed else 0)
                for step in (3, 4) if resumed else (1, 2, 3):
                    writer.append("offsets", step, {"loss": step + 0.5 * resumed})


def test_json_lines_are_always_written(tmp_path):
    write(tmp_path, [])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1), (2, 2), (3, 3.5), (4, 4.5)]
    assert {row["stage"] for row in rows} == {"offsets"}


def needs(extra):
    missing = importlib.util.find_spec(EXTRAS[extra]) is None
    return pytest.mark.skipif(missing, reason=f"needs the extra {extra}")


def records(data, kind):
    """The messages of a TFRecord file: length, checksum, bytes, checksum."""
    at = 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        yield kind.FromString(data[at + 12 : at + 12 + size])
        at += 12 + size + 4


@needs("tensorboard")
def test_tensorboard_files_hold_every_step_and_where_a_run_went_on(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    write(tmp_path, ["tensorboard"])
    events = []
    for file in sorted((tmp_path / "tensorboard" / "offsets").iterdir()):
        events += records(file.read_bytes(), Event)
    values = [(e.step, e.summary.value[0].simple_value) for e in events if e.summary.value]
    assert values == [(1, 1), (2, 2), (3, 3), (3, 3.5), (4, 4.5)]
    assert [e.step for e in events if e.session_log.status] == [1, 3]


@needs("wandb")
def test_weights_and_biases_works_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, ["wandb"])
    number = (tmp_path / "wandb_id").read_text()
    runs = sorted((tmp_path / "wandb").glob(f"offline-run-*-{number}/*.wandb"))
    assert runs and all(b"offsets/loss" in run.read_bytes() for run in runs)


def test_writers_that_are_not_there_are_named():
    with pytest.raises(ValueError, match=r"writer 'tensorbord'. Did you mean 'tensorboard'"):
        check_writers(["tensorbord"])


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is there")
def test_a_missing_package_says_which_extra_to_install():
    with pytest.raises(ValueError, match=r"needs wandb: pip install 'jaxheads\[wandb\]'"):
        check_writers(["wandb"])
