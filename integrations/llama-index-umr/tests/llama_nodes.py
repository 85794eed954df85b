"""One node of every kind that LlamaIndex has for text and pictures, and what each of them is."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageDocument,
    ImageNode,
    MediaResource,
    Node,
    TextNode,
)
from PIL import Image

from umr_plugins.types import Item


@dataclass(frozen=True)
class Kind:
    """A node and the item that it is."""

    node: BaseNode
    item: Item

    @property
    def name(self) -> str:
        return self.node.node_id


def png(number: int) -> bytes:
    """A picture that differs for each number."""
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (number * 17 % 256, number * 91 % 256, number)).save(out, "PNG")
    return out.getvalue()


def save(folder: Path, number: int) -> Path:
    path = folder / f"{number}.png"
    path.write_bytes(png(number))
    return path


def kinds(folder: Path) -> list[Kind]:
    """Fresh nodes of thirteen kinds; the id says which."""
    files = [save(folder, number) for number in range(13)]

    def b64(number: int) -> str:
        return base64.b64encode(png(number)).decode()

    def file(number: int) -> MediaResource:
        return MediaResource(path=files[number])

    def text(words: str) -> MediaResource:
        return MediaResource(text=words)

    def kind(cls: Any, name: str, item: Item, **fields: Any) -> Kind:
        return Kind(cls(id_=name, **fields), item)

    note = {"place": "Delft"}
    return [
        kind(TextNode, "text", Item("a text"), text="a text"),
        kind(
            TextNode,
            "text-metadata",
            Item("place: Delft\n\na noted text"),
            text="a noted text",
            metadata=note,
        ),
        kind(ImageNode, "image-path", Item(image=files[0]), image_path=str(files[0])),
        kind(ImageNode, "image-base64", Item(image=png(1)), image=b64(1)),
        kind(ImageNode, "image-metadata", Item(image=files[2]), image_path=str(files[2]), metadata=note),
        kind(
            ImageNode,
            "image-caption",
            Item("a caption", files[3]),
            image_path=str(files[3]),
            text="a caption",
        ),
        kind(Node, "node-image", Item(image=files[4]), image_resource=file(4)),
        kind(Node, "node-bytes", Item(image=png(5)), image_resource=MediaResource(data=png(5))),
        kind(Node, "node-fused", Item("both", files[6]), text_resource=text("both"), image_resource=file(6)),
        kind(ImageDocument, "image-document", Item(image=files[7]), image_path=str(files[7])),
        kind(
            ImageDocument,
            "image-document-text",
            Item("said", files[8]),
            image_path=str(files[8]),
            text="said",
        ),
        kind(
            Document,
            "document-fused",
            Item("written", png(9)),
            text="written",
            image_resource=MediaResource(data=png(9)),
        ),
        kind(Document, "document-text", Item("a document"), text="a document"),
    ]
