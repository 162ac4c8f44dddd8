"""Rows of maps and norms that many families store alike, as [out, in] with biases."""

from __future__ import annotations

from collections.abc import Mapping

from jaxheads.convert.table import Stored

_MAPS: Mapping[str, tuple[str, str]] = {
    "attn/q": ("(H Dh) D -> D H Dh", "(H Dh) -> H Dh"),
    "attn/k": ("(K Dh) D -> D K Dh", "(K Dh) -> K Dh"),
    "attn/v": ("(K Dh) D -> D K Dh", "(K Dh) -> K Dh"),
    "attn/o": ("D (H Dh) -> H Dh D", "D -> D"),
    "mlp/up": ("F D -> D F", "F -> F"),
    "mlp/down": ("D F -> F D", "D -> D"),
}
"""Stored axes -> ours of the maps of a block: their weight, their bias."""


def block_rows(prefix: str, names: Mapping[str, str], blocks: str = "blocks/") -> dict[str, Stored]:
    """Rows of a block whose maps each have a tensor .weight and a tensor .bias.

    Args:
      prefix: of the tensors' names, with the placeholder {L}.
      names: path below `blocks` -> the rest of the name. Paths that are no maps are norms.
      blocks: where the blocks are in the parameter tree.
    """
    rows: dict[str, Stored] = {}
    for path, name in names.items():
        kind = path.replace("cross/", "attn/")
        if kind in _MAPS:
            weight, bias = _MAPS[kind]
            rows[f"{blocks}{path}"] = Stored(f"{prefix}{name}.weight", weight)
            rows[f"{blocks}{path}_bias"] = Stored(f"{prefix}{name}.bias", bias)
        else:
            rows |= norm_rows(f"{blocks}{path}", f"{prefix}{name}")
    return rows


def norm_rows(path: str, name: str) -> dict[str, Stored]:
    """Rows of a layer norm."""
    return {
        f"{path}/scale": Stored(f"{name}.weight", "D -> D"),
        f"{path}/bias": Stored(f"{name}.bias", "D -> D"),
    }


def dense_rows(weight: str, bias: str, name: str) -> dict[str, Stored]:
    """Rows of a map from the width to the width: paths of its weight and bias."""
    return {
        weight: Stored(f"{name}.weight", "E D -> D E"),
        bias: Stored(f"{name}.bias", "D -> D"),
    }
