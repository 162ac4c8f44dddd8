"""Runs a model of transformers once and picks the values of its sites.

Axes as in tests/families.py; L layers, H query heads, Dh head size, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from families import Arrays

from family_reference.case import REAL, Case, Stack

POSITIONS, QUERIES, KEYS = 6, 4, 40

Seen = dict[str, list[torch.Tensor]]


def inputs_of(case: Case, vocab_size: int, seed: int) -> Arrays:
    """Tokens and masks of two rows, the second padded; nothing for images."""
    rng = np.random.default_rng(seed)
    arrays: Arrays = {}
    for stack in case.stacks:
        if not stack.side:
            continue
        tokens = rng.integers(3, vocab_size, (2, stack.length)).astype(np.int32)
        mask = np.ones(tokens.shape, bool)
        padding = stack.length - REAL * stack.length // 500
        mask[1, slice(padding) if stack.side == "left" else slice(-padding, None)] = False
        tokens[~mask] = case.settings.get("pad_token_id") or 0
        if stack.end:
            tokens[tokens == stack.end] = 3
            tokens[np.arange(2), np.where(mask, np.arange(stack.length), -1).argmax(1)] = stack.end
        name = _input_name(case, stack)
        arrays |= {f"{name}tokens": tokens, f"{name}mask": mask}
    return arrays


def _input_name(case: Case, stack: Stack) -> str:
    """How the arrays of a stack's input begin."""
    if any(other.prefix == "encoder." for other in case.stacks):
        return "source_" if stack.prefix == "encoder." else "target_"
    return ""


def indices_of(case: Case, inputs: Arrays, tokens: dict[str, int], seed: int) -> Arrays:
    """Sampled positions, queries and keys of every stack.

    Args:
      case: the case.
      inputs: of `inputs_of`.
      tokens: prefix of a stack -> its row length T.
      seed: of the choice.
    """
    rng = np.random.default_rng(seed + 1)
    out: Arrays = {}
    masks = {
        stack.prefix: inputs[f"{_input_name(case, stack)}mask"]
        if stack.side
        else np.ones((2, tokens[stack.prefix]), bool)
        for stack in case.stacks
    }
    for stack in case.stacks:
        mask = masks[stack.prefix]
        out[f"{stack.prefix}positions"] = _stacked(_spread(rng, row, POSITIONS) for row in mask)
        queries = _stacked(_spread(rng, row, QUERIES) for row in mask)
        out[f"{stack.prefix}queries"] = queries
        out[f"{stack.prefix}keys"] = _keys(rng, queries, mask.shape[1], case.window)
        if stack.cross:
            out[f"{stack.prefix}cross.keys"] = _keys(rng, queries, masks["encoder."].shape[1], 0)
    return out


def _stacked(rows: Iterator[np.ndarray]) -> np.ndarray:
    return np.stack(list(rows)).astype(np.int32)


def _spread(rng: np.random.Generator, real: np.ndarray, count: int) -> np.ndarray:
    """Real slots: the first, the second, the last, and some between."""
    slots = np.flatnonzero(real)
    ends = slots[[0, 1, -1]]
    between = np.sort(rng.choice(slots[2:-1], min(count, len(slots)) - 3, replace=False))
    return np.concatenate([ends[:2], between, ends[2:]])


def _keys(rng: np.random.Generator, queries: np.ndarray, length: int, window: int) -> np.ndarray:
    """Keys [B,Q,N]: near the query, on both sides of the window's ends, and anywhere."""
    near = [0, -1, -2, -3, -5, -8, -13, 1, 2, 5]
    for reach in {window, window // 2} - {0}:
        near += [reach * sign + step for sign in (-1, 1) for step in (-1, 0, 1)]
    count = min(KEYS, length)
    rows = []
    for query in queries.reshape(-1):
        close = np.unique(np.clip(query + np.array(near), 0, length - 1))[:count]
        rest = np.setdiff1d(np.arange(length), close)
        far = rng.choice(rest, count - len(close), replace=False)
        rows.append(np.concatenate([close, np.sort(far)]))
    return np.stack(rows).reshape(*queries.shape, count).astype(np.int32)


@contextmanager
def recording(model: torch.nn.Module, stack: Stack) -> Iterator[Seen]:
    """Collects the values of a stack's sites, a list of layers for each."""
    seen: Seen = {}

    def keep(name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        seen.setdefault(name, []).append(value.detach().clone())

    def entry(name: str) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            keep(name, args[0] if args else kwargs["hidden_states"])

        return hook

    def result(name: str) -> Any:
        return lambda module, args, out: keep(name, out)

    def weights(name: str) -> Any:
        def hook(module: Any, args: Any, out: tuple) -> None:
            maps = [part for part in out if torch.is_tensor(part) and part.dim() == 4]
            keep(name, maps[-1])

        return hook

    def boundary(place: str, name: str, layer: torch.nn.Module) -> list[Any]:
        side, _, path = place.partition(":")
        if side == "sum":
            return [layer.get_submodule(stack.o).register_forward_hook(result("branch"))]
        module = layer.get_submodule(path)
        if side == "input":
            return [module.register_forward_pre_hook(entry(name), with_kwargs=True)]
        return [module.register_forward_hook(result(name))]

    handles: list[Any] = []
    for layer in model.get_submodule(stack.layers):
        of = layer.get_submodule
        handles += [
            layer.register_forward_pre_hook(entry("resid_pre"), with_kwargs=True),
            layer.register_forward_hook(result("resid_post")),
            of(stack.o).register_forward_pre_hook(entry("z"), with_kwargs=True),
            of(stack.attention).register_forward_hook(weights("pattern")),
            *boundary(stack.mid, "resid_mid", layer),
        ]
        if stack.cross:
            handles += [
                of(stack.cross_o).register_forward_pre_hook(entry("cross.z"), with_kwargs=True),
                of(stack.cross).register_forward_hook(weights("cross.pattern")),
                *boundary(stack.cross_pre, "cross.resid_pre", layer),
            ]
    if stack.final:
        handles.append(model.get_submodule(stack.final).register_forward_hook(result("final")))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def run(
    model: torch.nn.Module, case: Case, inputs: Arrays
) -> tuple[dict[str, Seen], dict[str, torch.Tensor]]:
    """One forward pass: what each stack's sites held, by prefix, and the model's outputs."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, out: outputs.update({name: out.clone()})

    with ExitStack() as hooks, torch.no_grad():
        seen = {s.prefix: hooks.enter_context(recording(model, s)) for s in case.stacks}
        for name, path in case.outputs.items():
            handle = model.get_submodule(path).register_forward_hook(keep(name))
            hooks.callback(handle.remove)
        whole = model(**_arguments(case, inputs), output_attentions=True)
    if "logits" in whole:
        outputs["logits"] = whole["logits"]
    return seen, outputs


def _arguments(case: Case, inputs: Arrays) -> dict[str, torch.Tensor]:
    tensors = {name: torch.tensor(array) for name, array in inputs.items()}
    given: dict[str, torch.Tensor] = {}
    if "pixels" in tensors:
        given["pixel_values"] = tensors["pixels"].permute(0, 3, 1, 2)
    if "source_tokens" in tensors:
        return given | {
            "input_ids": tensors["source_tokens"].long(),
            "attention_mask": tensors["source_mask"].long(),
            "decoder_input_ids": tensors["target_tokens"].long(),
            "decoder_attention_mask": tensors["target_mask"].long(),
        }
    if "tokens" in tensors:
        mask = tensors["mask"].long()
        given |= {"input_ids": tensors["tokens"].long(), "attention_mask": mask}
        if any(stack.side == "left" for stack in case.stacks):
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return given


def values_of(
    case: Case, seen: dict[str, Seen], outputs: dict[str, torch.Tensor], indices: Arrays
) -> Arrays:
    """The values of every site at the sampled positions, float32."""
    values = dict(outputs)
    for stack in case.stacks:
        values |= _stack_values(stack, seen[stack.prefix], indices)
    if "logits" in values:
        logits, at = values["logits"], indices[f"{case.stacks[-1].prefix}positions"]
        values["logits"] = logits[:, None] if logits.dim() == 2 else _at(logits[None], at)[0]
    return {name: value.numpy().astype(np.float32) for name, value in values.items()}


def _stack_values(stack: Stack, seen: Seen, indices: Arrays) -> dict[str, torch.Tensor]:
    prefix = stack.prefix
    positions, queries = indices[f"{prefix}positions"], indices[f"{prefix}queries"]
    if stack.mid == "sum":
        pairs = zip(seen["resid_pre"], seen.pop("branch"), strict=True)
        seen["resid_mid"] = [x + out for x, out in pairs]
    # OPT joins rows and tokens before the norm of its MLP.
    shape = seen["resid_pre"][0].shape
    seen["resid_mid"] = [value.reshape(shape) for value in seen["resid_mid"]]
    last = seen.pop("resid_post")[-1]
    final = seen.pop("final")[0] if stack.final else last
    values = {f"{prefix}resid_last": _at(last[None], positions)[0]}
    if final.dim() == 2:  # a norm that sees the first token only
        values[f"{prefix}final_first"] = final
    else:
        values[f"{prefix}final"] = _at(final[None], positions)[0]
    for name, layers in seen.items():
        value = torch.stack(layers)
        if name.endswith("pattern"):
            keys = indices[f"{prefix}{'cross.' if 'cross' in name else ''}keys"]
            value = _at_keys(value, queries, keys)
        else:
            if name.endswith("z"):
                heads = seen[name.replace("z", "pattern")][0].shape[1]
                value = value.reshape(*value.shape[:3], heads, -1)
            value = _at(value, positions)
        values[prefix + name] = value
    return values


def _at(value: torch.Tensor, positions: np.ndarray) -> torch.Tensor:
    """[L,B,T,...] at positions [B,P] -> [L,B,P,...]."""
    rows = np.arange(len(positions))[:, None]
    return value[:, rows, positions]


def _at_keys(value: torch.Tensor, queries: np.ndarray, keys: np.ndarray) -> torch.Tensor:
    """[L,B,H,T,S] at queries [B,Q] and their keys [B,Q,N] -> [L,B,H,Q,N]."""
    rows = np.arange(len(queries))[:, None, None]
    picked = value.transpose(2, 3).transpose(3, 4)[:, rows, queries[..., None], keys]
    return picked.permute(0, 1, 4, 2, 3)


def sharpness(pattern: list[torch.Tensor], real: np.ndarray | None) -> float:
    """Mean over layers, heads and real queries of the largest weight of a query."""
    largest = torch.stack(pattern).amax(-1).numpy()
    sums = torch.stack(pattern).sum(-1).numpy()
    real = np.ones((2, largest.shape[-1]), bool) if real is None else real
    kept = np.broadcast_to(real[None, :, None], largest.shape)
    if not np.allclose(sums[kept], 1, atol=1e-5):
        raise ValueError("what was recorded as attention weights does not sum to one")
    return float(largest[kept].mean())
