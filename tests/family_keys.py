"""What each key of the families' config.json does, case by case; see test_family_configs.py."""

from __future__ import annotations

from typing import Any

import family_keys_encoders as encoders
import family_keys_gpt as gpt
import family_keys_llama as llama

# Another value for each key that sets fields of the config.
OTHER_VALUES: dict[str, dict[str, Any]] = {
    **gpt.OTHER_VALUES,
    **llama.OTHER_VALUES,
    **encoders.OTHER_VALUES,
}

# Keys with a value that is refused, and what the message says beside the name of the file.
REFUSED: list[tuple[str, dict[str, Any], str]] = [*gpt.REFUSED, *llama.REFUSED, *encoders.REFUSED]

# Keys of other versions of transformers that describe the same model.
SAME: list[tuple[str, dict[str, Any]]] = [*gpt.SAME, *llama.SAME, *encoders.SAME]

# Fields that no case has, which an export must be able to write.
WRITTEN: list[tuple[str, dict[str, Any]]] = [*gpt.WRITTEN, *llama.WRITTEN, *encoders.WRITTEN]

# Keys that others of the same file overrule, in transformers too.
OVERRULED: dict[str, tuple[str, ...]] = llama.OVERRULED

# Keys that say for how long a text the model is good, which changes no value.
LENGTHS = ("max_position_embeddings", "original_max_position_embeddings")
