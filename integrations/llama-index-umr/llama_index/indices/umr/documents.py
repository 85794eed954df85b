"""Documents on their way to nodes: which ones are split, and in what form a store keeps them."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from llama_index.core.bridge.pydantic import Field, SerializeAsAny
from llama_index.core.node_parser import NodeParser
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageNode,
    MetadataMode,
    Node,
    NodeRelationship,
    TextNode,
    TransformComponent,
)
from llama_index.embeddings.gme import PageNode
from llama_index.embeddings.gme.nodes import node_picture
from llama_index.embeddings.gme.observing import NeverCached

_SHARED = (
    "metadata",
    "excluded_embed_metadata_keys",
    "excluded_llm_metadata_keys",
    "metadata_template",
    "metadata_separator",
    "text_template",
    "embedding",
)


def has_picture(node: BaseNode) -> bool:
    """Whether a node names a picture, readable or not."""
    if isinstance(node, ImageNode):
        return isinstance(node, PageNode) or bool(node.image or node.image_path or node.image_url)
    return getattr(node, "image_resource", None) is not None


def to_storable(node: BaseNode, any_store: bool = False) -> BaseNode:
    """A copy of `node` in a form that comes back whole.

    A `Document` becomes an `ImageNode` or `TextNode` of the same id whose source is the document, since most
    stores return documents without their picture and `NodeWithScore.text` refuses them.

    Args:
        node: any node.
        any_store: make an `ImageNode` of everything else with a picture too. Stores other than
            `UMRVectorStore` keep picture bytes in no other class.

    Raises:
        ItemError: the node's picture can't be read.
    """
    if not isinstance(node, Document) and not (any_store and _loses_picture(node)):
        return node.model_copy()
    common: dict[str, Any] = {name: getattr(node, name) for name in _SHARED}
    relationships = dict(node.relationships)
    if isinstance(node, Document):
        relationships.setdefault(NodeRelationship.SOURCE, node.as_related_node_info())
    common |= {"id_": node.node_id, "relationships": relationships}
    common["text"] = node.get_content(MetadataMode.NONE)
    if isinstance(node, PageNode):
        return ImageNode(image=node.image, **common)
    picture = node_picture(node)
    if picture is None:
        return TextNode(**common)
    if isinstance(picture, bytes):
        return ImageNode(image=base64.b64encode(picture).decode("ascii"), **common)
    place = "image_path" if isinstance(picture, Path) else "image"
    return ImageNode(**{place: str(picture)}, **common)


def _loses_picture(node: BaseNode) -> bool:
    return has_picture(node) and (isinstance(node, PageNode) or isinstance(node, Node))


class KeepPictures(TransformComponent):
    """Runs a node parser on texts only; whatever has a picture passes as it is, one item for one vector.

    LlamaIndex's parsers turn a `Document` with a picture into text chunks without it, and drop the picture of
    a document without text. `MultimodalIndex` wraps every node parser in this.

    Args:
        parser: such as `SentenceSplitter()`.
    """

    parser: SerializeAsAny[TransformComponent] = Field(description="The node parser for texts.")

    def __init__(self, parser: TransformComponent) -> None:
        super().__init__(parser=parser)  # type: ignore[call-arg]  # a pydantic field

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serialises the class."""
        return "KeepPictures"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """The parser's options; see `NeverCached` for the class name."""
        data: dict[str, Any] = super().to_dict(**kwargs)
        return data | {"class_name": NeverCached(self.class_name())}

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Split the texts among `nodes`, in place."""
        out: list[BaseNode] = []
        for pictures, group in groupby(nodes, has_picture):
            members = list(group)
            out += members if pictures else self.parser(members, **kwargs)
        return out

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """`__call__` for coroutines."""
        out: list[BaseNode] = []
        for pictures, group in groupby(nodes, has_picture):
            members = list(group)
            out += members if pictures else await self.parser.acall(members, **kwargs)
        return out


def keep_pictures(transformations: Iterable[TransformComponent]) -> list[TransformComponent]:
    """The same steps, with every node parser wrapped in `KeepPictures`."""
    return [KeepPictures(step) if isinstance(step, NodeParser) else step for step in transformations]
