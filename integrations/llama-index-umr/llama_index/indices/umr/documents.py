"""Documents on their way to nodes: which ones are split, and in what form a store keeps them."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Self

from llama_index.core.bridge.pydantic import Field, SerializeAsAny
from llama_index.core.node_parser import NodeParser, SentenceSplitter, TokenTextSplitter
from llama_index.core.node_parser.node_utils import default_id_func
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
from llama_index.embeddings.gme.checks import check_picture
from llama_index.embeddings.gme.nodes import node_picture
from llama_index.embeddings.gme.observing import NeverCached
from llama_index.indices.umr.identity import own_source

from umr_plugins.errors import InputError

_SHARED = (
    "metadata",
    "excluded_embed_metadata_keys",
    "excluded_llm_metadata_keys",
    "metadata_template",
    "metadata_separator",
    "text_template",
    "embedding",
)
_FROM_DICT = {parser.class_name(): parser for parser in (SentenceSplitter, TokenTextSplitter)}
"""The parsers that come back from their own dump as they were; LlamaIndex's others lose functions in it."""


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
    check_picture(node)
    common: dict[str, Any] = {name: getattr(node, name) for name in _SHARED}
    relationships = dict(node.relationships)
    if isinstance(node, Document):
        if NodeRelationship.SOURCE not in relationships:
            relationships[NodeRelationship.SOURCE] = own_source(node)
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

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> Self:
        """The wrapper again, around `SentenceSplitter`, `TokenTextSplitter` or the `parser` that is given.

        Raises:
            InputError: the dict names another parser, or a function of your own, which no dict can hold.
        """
        parser = kwargs.get("parser", data["parser"])
        return cls(_parser_of(parser) if isinstance(parser, dict) else parser)

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
            out += members if pictures else await off_loop(self.parser, members, **kwargs)
        return out


async def off_loop(step: TransformComponent, nodes: Sequence[BaseNode], **options: Any) -> Sequence[BaseNode]:
    """`step.acall`; a step whose coroutine would work on the event loop works in a thread instead."""
    plain = type(step).acall is TransformComponent.acall
    if isinstance(step, NodeParser) and type(step).acall is NodeParser.acall:
        plain = type(step)._aparse_nodes is NodeParser._aparse_nodes
    if plain:
        return await asyncio.to_thread(step, nodes, **options)
    return await step.acall(nodes, **options)


def keep_pictures(transformations: Iterable[TransformComponent]) -> list[TransformComponent]:
    """The same steps, with every node parser wrapped in `KeepPictures`."""
    return [KeepPictures(step) if isinstance(step, NodeParser) else step for step in transformations]


def _parser_of(data: dict[str, Any]) -> TransformComponent:
    options = dict(data)
    numbering = options.pop("id_func", None)  # LlamaIndex dumps its name and does not read it back
    custom = isinstance(numbering, dict) and numbering.get("id_func_name") != default_id_func.__name__
    parser = _FROM_DICT.get(options.get("class_name", ""))
    if custom or parser is None:
        raise InputError(
            f"a parser ({options.get('class_name')}) with functions of its own, or other than "
            f"{' and '.join(_FROM_DICT)}, can't be made from a dict again; pass it as "
            "KeepPictures.from_dict(data, parser=...)"
        )
    made: TransformComponent = parser.from_dict(options)
    return made
