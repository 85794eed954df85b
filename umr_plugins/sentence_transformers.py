"""Our models as sentence-transformers models: the same vectors, in any tool that takes those.

`write` makes a folder, `add_to` makes one of a whole checkpoint without copying it, `load` opens it. So does
`SentenceTransformer(folder, trust_remote_code=True)` wherever umr-plugins is installed: sentence-transformers
asks for that flag whenever a model's class is not its own; the folder itself holds no code. torchvision is
not needed. For inference; the weights can't be trained through it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from umr_plugins.backbones.merge import checkpoint_files
from umr_plugins.backbones.registry import write_sidecar
from umr_plugins.embedder import Embedder
from umr_plugins.errors import InputError, MissingExtraError
from umr_plugins.st_files import ADAPTER, OPTIONS, add_to, write_options
from umr_plugins.types import FloatArray, Item, ItemLike

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modality import infer_modality
    from sentence_transformers.base.modules import InputModule
except ImportError as error:
    raise MissingExtraError(
        "sentence-transformers 6 or newer is not installed: pip install 'umr-plugins[sentence-transformers]'"
    ) from error


def write(model: Embedder | str | Path, folder: str | Path) -> Path:
    """Write a model as a sentence-transformers folder, weights and adapter included; returns the folder.

    Args:
        model: an `Embedder`, whose options (dim, token limits, positions, adapter) are kept, or what
            `Embedder` takes.
        folder: new or empty.

    Raises:
        InputError: the folder has something in it.
        ModelNotFoundError: no such model.

    Example:
        >>> import tempfile
        >>> folder = write("umr-tiny", tempfile.mkdtemp())  # a demonstration model
        >>> load(folder).encode(["a red apple"]).shape
        (1, 256)
    """
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty; give a new folder")
    embedder = model if isinstance(model, Embedder) else Embedder(model)
    SentenceTransformer(modules=[UMRModule(embedder)]).save(str(folder))
    return folder


def load(folder: str | Path, *, device: str | None = None, **options: Any) -> SentenceTransformer:
    """Open what `write` wrote, from a folder or the hub.

    Args:
        folder: the folder or hub id.
        device: torch device; the GPU when there is one.
        options: for `UMRModule.load`: revision, token, cache_folder, local_files_only, model_kwargs.
    """
    return SentenceTransformer(modules=[UMRModule.load(str(folder), **options)], device=device)


class UMRModule(InputModule):
    """The only module of such a model: everything from an item to its unit vector.

    `prompt` is the instruction, as in `Embedder.encode_queries`. A string is a picture where
    sentence-transformers takes it for one (an address or path that ends like a picture's), else text.
    """

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.embedder = embedder
        # What sentence-transformers reads device and dtype from, and moves.
        self.register_buffer("anchor", torch.empty(0, dtype=embedder.dtype, device=embedder.device), False)

    @property
    def modalities(self) -> list[Any]:
        """`message` stands for lists that mix texts and pictures; chat messages themselves are refused."""
        return ["text", "image", ("image", "text"), "message"]

    @property
    def max_seq_length(self) -> int:
        """Tokens per item, pictures included."""
        return self.embedder.spec.max_length

    def get_embedding_dimension(self) -> int:
        """Length of the vectors."""
        return self.embedder.dim

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None, **unused: Any
    ) -> dict[str, Any]:
        """Items with their role; the embedder prepares them, pictures in threads ahead of the model."""
        return {"items": [_item(each) for each in inputs], "instruction": prompt or None, "task": task}

    def forward(self, features: dict[str, Any], **unused: Any) -> dict[str, Any]:
        """Add `sentence_embedding` `[n, dim]`: float32, unit length.

        Raises:
            BatchError: names every item that can't be embedded.
        """
        if self.training and torch.is_grad_enabled():
            raise InputError("this model is for inference; its weights can't be trained through it")
        items, instruction = features["items"], features["instruction"]
        vectors: FloatArray
        if features["task"] == "document":
            vectors = self.embedder.encode_documents(items, instruction)
        else:
            vectors = self.embedder.encode_queries(items, instruction)
        return {**features, "sentence_embedding": torch.from_numpy(vectors).to(self.anchor.device)}

    def _apply(self, fn: Any, recurse: bool = True) -> UMRModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        embedder, device = self.embedder, self.anchor.device
        if (device.type, device.index or 0) != (embedder.device.type, embedder.device.index or 0) or (
            self.anchor.dtype != embedder.dtype
        ):
            self.embedder = Embedder(**embedder.config, device=device, dtype=self.anchor.dtype)
            embedder.close()
        return self

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Copy checkpoint and adapter, and write the options that give the same vectors."""
        checkpoint, out = self.embedder.checkpoint, Path(output_path)
        out.mkdir(parents=True, exist_ok=True)
        for path in checkpoint_files(checkpoint.folder):
            shutil.copyfile(path, out / path.name)
        if checkpoint.adapter is not None:
            (out / ADAPTER).mkdir(exist_ok=True)
            for path in checkpoint_files(checkpoint.adapter):
                shutil.copyfile(path, out / ADAPTER / path.name)
        write_sidecar(out, self.embedder.spec)
        write_options(out, dim=self.embedder.dim, adapter=checkpoint.adapter is not None)

    @classmethod
    def load(  # type: ignore[override]  # the host's own arguments, of which these are used
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        **unused: Any,
    ) -> UMRModule:
        """Open what `save` wrote, from a folder or the hub."""
        folder = cls.load_dir_path(
            model_name_or_path,
            subfolder,
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        if folder is None:
            raise InputError(f"there is no folder {model_name_or_path!r}")
        if not (Path(folder) / OPTIONS).is_file():
            raise InputError(
                f"{model_name_or_path!r} has no {OPTIONS}: it was not written by umr_plugins; make it with "
                "umr_plugins.sentence_transformers.write"
            )
        options = json.loads((Path(folder) / OPTIONS).read_text(encoding="utf-8"))
        if "adapter" in options:
            options["adapter"] = Path(folder) / options["adapter"]
        given = model_kwargs or {}
        dtype = given.get("dtype", given.get("torch_dtype"))
        return cls(Embedder(folder, dtype=None if dtype == "auto" else dtype, **options))


def _item(value: Any) -> ItemLike:
    if isinstance(value, str) and infer_modality(value) == "image":
        return Item(image=value)
    if isinstance(value, dict) and isinstance(value.get("image"), list | tuple):
        pictures = tuple(value["image"])
        return Item(value.get("text"), images=pictures)
    item: ItemLike = value
    return item


__all__ = ["UMRModule", "add_to", "load", "write"]
