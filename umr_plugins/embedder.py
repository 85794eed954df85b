"""`Embedder`: text, pictures and picture-with-text to vectors of one space."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch

from umr_plugins.backbones.load import load_backbone
from umr_plugins.backbones.registry import describe, resolve, resolve_adapter
from umr_plugins.backbones.spec import Positions
from umr_plugins.encoding.engine import Engine, join, with_progress
from umr_plugins.encoding.fingerprint import fingerprint
from umr_plugins.encoding.options import check_dim, check_spec, choose_device, choose_dtype, positive
from umr_plugins.errors import BatchError, InputError
from umr_plugins.types import (
    Encoded,
    FloatArray,
    ImageSource,
    Item,
    ItemLike,
    Modality,
    OnError,
    PagesMode,
    Role,
    as_item,
    check_on_error,
)

_log = logging.getLogger(__name__)

DEFAULT_MODEL = "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct"


class Embedder:
    """An embedding model, loaded once, usable from any number of threads.

    Args:
        model: bundled alias (`"umr-tiny"`), folder, or Hugging Face id; the default is GME-2B.
        device: torch device; the GPU when there is one.
        dtype: `"float32"`, `"bfloat16"` or a torch dtype; bfloat16 where the machine computes in it.
        dim: length of the vectors. Shorter than the model's own cuts and renormalises; whether the checkpoint
            was trained for it is `info()["dim_trained"]` (GME was not).
        min_image_tokens: fewest visual tokens of a picture (small ones are enlarged).
        max_image_tokens: most visual tokens of a picture (large ones are shrunk).
        max_length: tokens per item; longer text is cut at its end, with a warning.
        positions: `"sequential"` as GME's released code does, or `"mrope"`.
        max_batch_tokens: budget of one forward pass; lower it when memory is short.
        revision: branch, tag or commit of a hub id.
        adapter: folder or hub id of a LoRA adapter as peft saves it, merged into the weights.

    Raises:
        ModelNotFoundError: no such model; says what was tried.
        CheckpointError: the checkpoint is incomplete or of an unknown family.
        InputError: an option has a value that is not allowed.

    Example:
        >>> from umr_plugins import Embedder
        >>> embedder = Embedder("umr-tiny")  # a demonstration model; leave it out for GME-2B
        >>> vectors = embedder.encode_documents(["a red apple", {"text": "an apple", "image": None}])
        >>> vectors.shape == (2, embedder.dim)
        True
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        dim: int | None = None,
        min_image_tokens: int | None = None,
        max_image_tokens: int | None = None,
        max_length: int | None = None,
        positions: Positions | None = None,
        max_batch_tokens: int | None = None,
        revision: str | None = None,
        adapter: str | Path | None = None,
    ) -> None:
        checkpoint = resolve(model, revision)
        if adapter is not None:
            checkpoint = dataclasses.replace(checkpoint, adapter=resolve_adapter(adapter))
        options = {
            "min_image_tokens": min_image_tokens,
            "max_image_tokens": max_image_tokens,
            "max_length": max_length,
            "positions": positions,
        }
        given = {name: value for name, value in options.items() if value is not None}
        spec = dataclasses.replace(checkpoint.spec, **given)  # type: ignore[arg-type]  # checked just below
        check_spec(spec)
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, spec, self.device)
        backbone = load_backbone(dataclasses.replace(checkpoint, spec=spec), self.device, self.dtype)
        self.spec = spec
        """What the model is and how its inputs are written."""
        self.checkpoint = checkpoint
        """Where its files are."""
        self._dim = check_dim(dim, backbone.hidden_size)
        self._modalities = backbone.modalities
        budget = max_batch_tokens
        if budget is None:
            budget = 32_768 if self.device.type == "cuda" else 8_192
        self._engine = Engine(backbone, self._dim, positive("max_batch_tokens", budget))
        self._fingerprint = fingerprint(checkpoint, backbone, self._dim)
        self.config: dict[str, Any] = {
            "model": checkpoint.given if checkpoint.origin != "folder" else str(checkpoint.folder),
            **given,
            **({"dim": dim} if dim is not None else {}),
            **({"revision": revision} if revision is not None else {}),
            **({"adapter": str(checkpoint.adapter)} if checkpoint.adapter is not None else {}),
        }
        """Keyword arguments that make an embedder of the same vectors, as JSON values."""
        self._machine = {
            "device": None if device is None else str(self.device),
            "dtype": None if dtype is None else str(self.dtype).removeprefix("torch."),
            "max_batch_tokens": max_batch_tokens,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        # Weights and threads don't travel: the receiving process loads the model, once.
        return (_restored, ({**self.config, **self._machine},))

    @property
    def dim(self) -> int:
        """Length of every vector."""
        return self._dim

    @property
    def fingerprint(self) -> str:
        """Changes whenever a document's vector could; dtype and device are not part of it."""
        return self._fingerprint

    @property
    def modalities(self) -> frozenset[Modality]:
        """What the model takes."""
        return self._modalities

    @property
    def pages(self) -> PagesMode:
        """What a PDF page is embedded as: `image`, or `fused` with its text for models that can't read."""
        return self.spec.pages

    @property
    def is_demo(self) -> bool:
        """Whether this is a demonstration model."""
        return self.spec.demo

    @overload
    def encode_queries(
        self,
        items: Sequence[ItemLike],
        instruction: str | None = None,
        *,
        on_error: Literal["raise"] = "raise",
        show_progress: bool = False,
    ) -> FloatArray: ...
    @overload
    def encode_queries(
        self,
        items: Sequence[ItemLike],
        instruction: str | None = None,
        *,
        on_error: OnError = ...,
        show_progress: bool = False,
    ) -> FloatArray | Encoded: ...
    def encode_queries(
        self,
        items: Sequence[ItemLike],
        instruction: str | None = None,
        *,
        on_error: OnError = "raise",
        show_progress: bool = False,
    ) -> FloatArray | Encoded:
        """Vectors of queries: float32 `[n, dim]`, unit length, input order.

        Args:
            items: any mix of texts, pictures and both.
            instruction: what is searched for, e.g. "Find an image that matches the given text."; it goes
                into the system turn. An item's own instruction comes first.
            on_error: `"raise"` raises one `BatchError` naming every bad item; `"skip"` returns `Encoded`.
            show_progress: a bar on stderr.
        """
        return self._encode(items, "query", instruction, on_error, show_progress)

    @overload
    def encode_documents(
        self,
        items: Sequence[ItemLike],
        instruction: str | None = None,
        *,
        on_error: Literal["raise"] = "raise",
        show_progress: bool = False,
    ) -> FloatArray: ...
    @overload
    def encode_documents(
        self,
        items: Sequence[ItemLike],
        instruction: str | None = None,
        *,
        on_error: OnError = ...,
        show_progress: bool = False,
    ) -> FloatArray | Encoded: ...
    def encode_documents(
        self,
        items: Sequence[ItemLike],
        instruction: str | None = None,
        *,
        on_error: OnError = "raise",
        show_progress: bool = False,
    ) -> FloatArray | Encoded:
        """Vectors of documents: float32 `[n, dim]`, unit length, input order.

        As `encode_queries`, but documents always carry the model's own instruction (GME, section 4.1), so
        `instruction` must be None.
        """
        return self._encode(items, "document", instruction, on_error, show_progress)

    def _encode(
        self,
        items: Sequence[ItemLike],
        role: Role,
        instruction: str | None,
        on_error: OnError,
        show_progress: bool,
    ) -> FloatArray | Encoded:
        check_on_error(on_error)
        if isinstance(items, str | bytes | Path | Item) or not isinstance(items, Sequence):
            raise InputError(
                f"items is a list of items, got {type(items).__name__}; for one item pass [item]"
            )
        batches = self._engine.stream(items, role, instruction)
        encoded = join(with_progress(batches, len(items)) if show_progress else batches, self._dim)
        if on_error == "skip":
            return encoded
        if encoded.errors:
            raise BatchError(encoded.errors, len(items))
        return encoded.vectors

    def stream(
        self, items: Iterable[ItemLike], role: Role = "document", instruction: str | None = None
    ) -> Iterator[Encoded]:
        """Encode a corpus larger than memory: yields `Encoded` chunks, positions counted over all items.

        Bad items are reported in each chunk's `errors` and cost only themselves.
        """
        if role not in ("query", "document"):
            raise InputError(f'role must be "query" or "document", got {role!r}')
        return self._engine.stream(items, role, instruction)

    def render(self, item: ItemLike, role: Role = "query", instruction: str | None = None) -> str:
        """The exact string that is encoded, special tokens and all, one picture token per picture.

        >>> Embedder("umr-tiny").render({"text": "cat", "image": "cat.png"})
        '<|im_start|><|vision_start|><|image_pad|><|vision_end|>cat<|endoftext|>'
        """
        return self._engine.render(as_item(item), role, instruction)

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, without template."""
        return self._engine.count_tokens(text)

    def get_text_embeddings(
        self, texts: Sequence[str], *, is_query: bool = True, instruction: str | None = None, **unused: Any
    ) -> torch.Tensor:
        """As GME's released wrapper: CPU tensor `[n, dim]`."""
        return self.get_fused_embeddings(texts=texts, is_query=is_query, instruction=instruction, **unused)

    def get_image_embeddings(
        self,
        images: Sequence[ImageSource],
        *,
        is_query: bool = True,
        instruction: str | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """As GME's released wrapper: CPU tensor `[n, dim]`."""
        return self.get_fused_embeddings(images=images, is_query=is_query, instruction=instruction, **unused)

    def get_fused_embeddings(
        self,
        texts: Sequence[str | None] | None = None,
        images: Sequence[ImageSource | None] | None = None,
        *,
        is_query: bool = True,
        instruction: str | None = None,
        show_progress_bar: bool = False,
        batch_size: int | None = None,
    ) -> torch.Tensor:
        """As GME's released wrapper, so that its users can switch by an import: CPU tensor `[n, dim]`.

        `batch_size` is accepted and not needed: batches follow `max_batch_tokens`. Unlike the wrapper's, a
        list may mix items with and without picture or text.
        """
        if texts is None and images is None:
            raise InputError("give texts, images or both")
        count = len(texts if texts is not None else images or ())
        for name, column in (("texts", texts), ("images", images)):
            if column is not None and len(column) != count:
                raise InputError(
                    f"texts and images must have the same length; {name} has {len(column)}, not {count}"
                )
        items = [
            Item(text, image)
            for text, image in zip(texts or [None] * count, images or [None] * count, strict=True)
        ]
        if is_query:
            return torch.from_numpy(self.encode_queries(items, instruction, show_progress=show_progress_bar))
        return torch.from_numpy(self.encode_documents(items, show_progress=show_progress_bar))

    def info(self) -> dict[str, Any]:
        """What is loaded, as JSON values."""
        return {
            **describe(self.checkpoint),
            **dataclasses.asdict(self.spec),
            "dim": self._dim,
            "dim_trained": self._dim == self._engine.backbone.hidden_size
            or (self.spec.shortest_trained_dim or self._dim + 1) <= self._dim,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "fingerprint": self._fingerprint,
        }

    def close(self) -> None:
        """End the worker thread and free it. Later calls raise."""
        self._engine.close()


_shared: dict[str, Embedder] = {}
_shared_lock = threading.Lock()


def shared_embedder(model: str | Path = DEFAULT_MODEL, **options: Any) -> Embedder:
    """The one embedder of this process for these arguments, loaded on first use.

    Framework objects are copied, pickled and rebuilt freely; through this they share one set of weights.
    """
    key = json.dumps(
        {"model": str(model), **{k: v for k, v in options.items() if v is not None}},
        sort_keys=True,
        default=str,
    )
    with _shared_lock:
        if key not in _shared:
            _shared[key] = Embedder(model, **options)
        return _shared[key]


def _restored(options: dict[str, Any]) -> Embedder:
    return shared_embedder(**options)


__all__ = ["DEFAULT_MODEL", "Embedder", "shared_embedder"]
