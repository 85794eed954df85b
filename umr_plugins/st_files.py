"""The small files that make a checkpoint's folder a sentence-transformers model; needs no such library."""

from __future__ import annotations

import json
from pathlib import Path

from umr_plugins.errors import InputError

OPTIONS, ADAPTER = "umr_sentence_transformers.json", "adapter"
"""Names in the folder: the embedder's options, and the folder of its adapter, where it has one."""

_MODULES = [{"idx": 0, "name": "0", "path": "", "type": "umr_plugins.sentence_transformers.UMRModule"}]
_CONFIG = {
    "default_prompt_name": None,
    "model_type": "SentenceTransformer",
    "prompts": {"document": "", "query": ""},
    "similarity_fn_name": "cosine",
}


def add_to(folder: str | Path, *, dim: int) -> None:
    """Add to a whole checkpoint what `SentenceTransformer(folder, trust_remote_code=True)` opens it by.

    The weights stay where they are; for a model with an adapter or other options use
    `umr_plugins.sentence_transformers.write`.

    Args:
        folder: a checkpoint with its `umr.json`, as `umr merge` writes it.
        dim: length of the vectors.

    Raises:
        InputError: there is no such checkpoint, or `dim` is no length.
    """
    folder = Path(folder).expanduser()
    if not (folder / "umr.json").is_file():
        raise InputError(f"{folder} has no umr.json; give the folder of a whole checkpoint written by umr")
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise InputError(f"dim must be a whole number of at least 1, got {dim!r}")
    write_options(folder, dim=dim)
    for name, value in (("modules.json", _MODULES), ("config_sentence_transformers.json", _CONFIG)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_options(folder: Path, *, dim: int, adapter: bool = False) -> None:
    """Write the embedder's options; `adapter` says that the folder holds one."""
    options = {"dim": dim, **({"adapter": ADAPTER} if adapter else {})}
    (folder / OPTIONS).write_text(json.dumps(options) + "\n", encoding="utf-8")
