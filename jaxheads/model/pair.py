"""What the configs of models with two stacks have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from jaxheads.model.config import ModelConfig


@dataclass(frozen=True)
class PairConfig:
    """A base for frozen dataclasses whose fields are the `ModelConfig`s of two stacks."""

    @property
    def sides(self) -> dict[str, ModelConfig]:
        """The configs by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def family(self) -> str:
        """Name of the converter table that exports it."""
        return next(iter(self.sides.values())).family

    @property
    def dtype(self) -> str:
        """Dtype of the activations."""
        return next(iter(self.sides.values())).dtype

    def part(self, path: str) -> ModelConfig:
        """The config of the stack that a parameter belongs to; what both share, of the last."""
        sides = self.sides
        return sides.get(path.partition("/")[0], list(sides.values())[-1])

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields of both stacks changed."""
        return type(self)(**{name: side.replace(**changes) for name, side in self.sides.items()})

    def to_dict(self) -> dict[str, Any]:
        """The fields as values that JSON can hold; `from_dict` reads them back."""
        return {name: side.to_dict() for name, side in self.sides.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The config that `to_dict` described.

        Raises:
          ValueError: a field is missing, unknown or of the wrong type.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if sorted(fields) != sorted(names):
            raise ValueError(f"config: expected {' and '.join(names)}, got {', '.join(fields)}")
        return cls(**{name: ModelConfig.from_dict(side) for name, side in fields.items()})
