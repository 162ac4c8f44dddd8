"""Models of the Hugging Face hub by id, through `huggingface_hub` and its local cache."""

from __future__ import annotations

import re
from pathlib import Path

_WANTED = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# Other tools' copies of the same weights: folders such as onnx/, and Mistral's own format.
_UNWANTED = ("*/*", "consolidated*")
_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<file>[^:]+\.gguf))?")


def parse_id(name: str) -> tuple[str, str | None] | None:
    """Reads "org/name" or "org/name:file.gguf".

    Returns:
      The repository and the file in it, or None for the whole; None if it is no id.
    """
    match = _ID.fullmatch(name)
    return (match["repo"], match["file"]) if match else None


def download(
    repo: str,
    file: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """A model of the hub on the local disk; downloads what is not there yet.

    Only JSON, safetensors, the tokenizer and, by name, a GGUF file; never pickled weights.

    Args:
      repo: "org/name".
      file: one .gguf file of the repository; None for config, safetensors and tokenizer.
      revision: branch, tag or commit; None for the main branch.
      cache_dir: the cache; None for the one that `huggingface_hub` uses.
      local_files_only: whether to look in the cache only.

    Returns:
      The directory in the cache, or the path of the file.

    Raises:
      ValueError: no such repository, revision or file, no permission, or no connection and
        nothing in the cache. The message says what would be downloaded, and how.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if file is not None:
            if ".." in Path(file).parts:
                raise ValueError(f"{file!r} leads out of the repository")
            found = hf_hub_download(
                repo,
                file,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
            return Path(found)
        path = Path(
            snapshot_download(
                repo,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=list(_WANTED),
                ignore_patterns=list(_UNWANTED),
            )
        )
        # A cache that was filled by hand, or by another tool, may hold other files alone.
        if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
            return path
        reason = (
            f"{path} has no config.json with safetensors (pickled weights are never read; "
            f"a GGUF file is loaded as {repo}:FILE.gguf)"
        )
    except Exception as error:  # of the network below too, which have no base in common
        reason = _reason(error)
    # Outside of the handler, so that pages of network detail do not follow the message.
    raise ValueError(_advice(repo, file, revision, reason))


def _reason(error: Exception) -> str:
    """In a line, why the hub gave nothing."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    known: tuple[tuple[type[Exception], str], ...] = (
        (LocalEntryNotFoundError, "not in the local cache, and the hub was not reached"),
        (GatedRepoError, "its owner must grant access first; then log in: hf auth login"),
        (RepositoryNotFoundError, "no such repository, or a private one (log in: hf auth login)"),
        (RevisionNotFoundError, "no such revision"),
        (EntryNotFoundError, "no such file"),
    )
    first = next(iter(str(error).splitlines()), "")
    fallback = f"{type(error).__name__}: {first}"
    return next((text for kind, text in known if isinstance(error, kind)), fallback)


def _advice(repo: str, file: str | None, revision: str | None, reason: str) -> str:
    """What was wanted, why it is not there, and how to get it."""
    command = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    command += f" {file}" if file else "".join(f" --include '{name}'" for name in _WANTED)
    return (
        f"cannot load {repo}{f':{file}' if file else ''} from the Hugging Face hub: {reason}. "
        f"There is no such path here either. To download it where there is a connection: "
        f"{command}; or give the path of a local copy"
    )
