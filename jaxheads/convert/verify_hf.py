"""The certificate against Hugging Face transformers: the same files, loaded and run by both.

The one module that imports torch and transformers, and only when it is called.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from jaxheads.convert.certificate import Row, compare
from jaxheads.convert.verify import Inputs, forward, padded, text_config, towers
from jaxheads.model.clip import Clip
from jaxheads.model.encoder_decoder import EncoderDecoder
from jaxheads.model.models import Model
from jaxheads.model.tower import Tower
from jaxheads.model.transformer import Transformer

INSTALL = "pip install torch==2.13.0 transformers==5.23.0 'accelerate>=1.15,<2'"
"""The versions that the stored reference values were made with."""

_CLASSES = {
    "lm": "AutoModelForCausalLM",
    "mlm": "AutoModelForMaskedLM",
    "classes": "AutoModelForImageClassification",
    "none": "AutoModel",
}
"""What makes logits -> the class of transformers that does."""


def load_peers() -> tuple[Any, Any]:
    """torch and transformers.

    Raises:
      ValueError: one is not installed; the message is the command that installs them.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(f"--against hf needs {error.name}: {INSTALL}") from error
    return torch, transformers


def against_hf(model: Model, path: Path, inputs: Inputs) -> list[Row]:
    """Compares a model with what transformers makes of its files, in float32, eager attention.

    Compared are the residual streams between the blocks, the pooled vectors and the logits, at
    the real tokens of a row and of a shorter one that is padded: on both sides where
    transformers counts positions as it is told, else on the right.

    Args:
      model: as loaded from `path`.
      path: a Hugging Face directory or a .gguf file.
      inputs: as `verify.sample_inputs` makes them.

    Raises:
      ValueError: torch or transformers is not installed, the files are none that transformers
        reads, or it does not find all weights in them.
    """
    torch, transformers = load_peers()
    peer = _load(torch, transformers, model, path)
    batch, arguments = _arguments(torch, peer, model, inputs)
    with ExitStack() as hooks, torch.no_grad():
        streams = {
            prefix: _record(hooks, _blocks(torch, peer, prefix, tower))
            for prefix, tower in towers(model).items()
        }
        out = peer(**arguments)
    reference: dict[str, Any] = {}
    for prefix, (entering, leaving) in streams.items():
        reference[f"{prefix}resid_pre"] = torch.stack(entering).numpy()
        reference[f"{prefix}resid_post"] = torch.stack(leaving).numpy()
    ours = forward(model, batch, ("resid_pre", "resid_post"))
    reference |= _outputs(model, out)
    if isinstance(model, Clip):
        for name in ("text.pooled", "vision.pooled"):  # transformers returns them normalised
            ours[name] = ours[name] / np.linalg.norm(ours[name], axis=-1, keepdims=True)
    return list(compare("hf", reference, ours, model.config.dtype, batch.mask))


def _load(torch: Any, transformers: Any, model: Model, path: Path) -> Any:
    head = "none" if isinstance(model, Clip) else "lm"
    if isinstance(model, Transformer):
        head = model.config.head
    name = _CLASSES[head]
    if isinstance(model, EncoderDecoder):
        name = "AutoModelForSeq2SeqLM"
    file = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    if not file and not (path / "config.json").is_file():
        raise ValueError(
            f"{path} is not a Hugging Face directory or a .gguf file: transformers cannot read it"
        )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        peer, report = getattr(transformers, name).from_pretrained(
            path.parent if file else path,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            local_files_only=True,
            **file,
        )
    except (OSError, ImportError, RuntimeError, KeyError) as error:
        raise ValueError(f"transformers cannot load {path}: {error}") from error
    pooled = isinstance(model, Transformer) and model.config.pooler
    missing = [name for name in report["missing_keys"] if pooled or "pooler" not in name]
    if missing:
        raise ValueError(f"transformers does not find {', '.join(missing)} in {path}")
    return peer.eval()


def _arguments(
    torch: Any, peer: Any, model: Model, inputs: Inputs
) -> tuple[Inputs, dict[str, Any]]:
    """The batch for us, and the same for transformers."""
    arguments: dict[str, Any] = {}
    if inputs.pixels is not None:
        arguments["pixel_values"] = torch.tensor(inputs.pixels).permute(0, 3, 1, 2)
    config = text_config(model)
    if config is None or inputs.tokens is None:
        return inputs, arguments
    counts = "position_ids" in inspect.signature(peer.forward).parameters
    counts = counts and isinstance(model, Transformer) and config.causal
    pad = getattr(peer.config.get_text_config(), "pad_token_id", None)
    pad = pad if pad is not None and 0 <= pad < config.vocab_size else 0
    batch = padded(inputs, ("left", "right") if counts else ("right",), config, pad)
    tokens, mask = torch.tensor(batch.tokens).long(), torch.tensor(batch.mask).long()
    arguments |= {"input_ids": tokens, "attention_mask": mask}
    if counts:
        arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if isinstance(model, EncoderDecoder):
        arguments |= {"decoder_input_ids": tokens, "decoder_attention_mask": mask}
    return batch, arguments


def _blocks(torch: Any, peer: Any, prefix: str, tower: Tower) -> list[Any]:
    """The blocks of a stack: the outermost list of modules as long as it."""
    inside = prefix.removesuffix(".") or ("decoder" if tower.config.cross else "")
    found: dict[str, Any] = {}
    for name, module in peer.named_modules():
        nested = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, torch.nn.ModuleList) and inside in name and not nested:
            found[name] = module
    lists = [list(blocks) for blocks in found.values() if len(blocks) == tower.config.n_layers]
    if len(lists) != 1:
        raise ValueError(
            f"{type(peer).__name__} has {len(lists)} lists of {tower.config.n_layers} blocks "
            f"{f'under {inside} ' if inside else ''}in transformers, expected one"
        )
    return lists[0]


def _record(hooks: ExitStack, blocks: list[Any]) -> tuple[list[Any], list[Any]]:
    """Collects, while the hooks last, the residual streams that enter and leave blocks."""
    entering: list[Any] = []
    leaving: list[Any] = []

    def enter(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        entering.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    def leave(module: Any, args: Any, out: Any) -> None:
        leaving.append((out[0] if isinstance(out, tuple) else out).detach().clone())

    for block in blocks:
        hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
        hooks.callback(block.register_forward_hook(leave).remove)
    return entering, leaving


def _outputs(model: Model, out: Any) -> dict[str, Any]:
    names = {"logits": "logits", "pooled": "pooler_output"}
    if isinstance(model, Clip):
        names = {"text.pooled": "text_embeds", "vision.pooled": "image_embeds"}
    found = {ours: out.get(theirs) for ours, theirs in names.items()}
    values = {name: value.numpy() for name, value in found.items() if value is not None}
    if "logits" in values and values["logits"].ndim == 2:  # a classifier's: ours has an axis T
        values["logits"] = values["logits"][:, None]
    return values
