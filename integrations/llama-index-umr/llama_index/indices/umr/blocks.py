"""What an LLM is shown: documents, pictures and the question, as blocks of one message."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from numbers import Integral

from llama_index.core.base.llms.types import ImageBlock, TextBlock
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore
from llama_index.embeddings.gme import PageNode
from llama_index.embeddings.gme.nodes import name_of
from llama_index.embeddings.gme.roots import Roots, allowed_picture
from llama_index.indices.umr.memory import tokens_of
from llama_index.indices.umr.passages import place_of

from umr_plugins.errors import InputError, ItemError
from umr_plugins.media.jpeg import MAX_SIDE, as_jpeg
from umr_plugins.media.roots import absolute_roots
from umr_plugins.types import ImageSource

_log = logging.getLogger(__name__)

Block = TextBlock | ImageBlock

_NOTE = 16  # tokens of the block that says what had no room


class Blocks:
    """Writes documents and questions as blocks that chat models read.

    Every document comes under its number, with its text, metadata and picture. Pictures are
    decoded, shrunk and sent as JPEG, so nothing but pictures leaves the machine, whatever file a node names;
    and a file that a node names is opened only where `allowed_picture` allows it.

    Args:
        max_pictures: most pictures of documents in one message, best first. A document beyond that is shown
            as text, and left out if it has none. The user's own pictures do not count.
        max_side: pixels of the longer side to which pictures are shrunk.
        roots: folders below which files may lie that nodes of other stores name.

    Raises:
        InputError: limits or roots that are none.
    """

    def __init__(self, max_pictures: int = 8, max_side: int = MAX_SIDE, roots: Roots = ()) -> None:
        check_whole("max_pictures", max_pictures, 0)
        check_whole("max_side", max_side, 1)
        self.max_pictures, self.max_side = max_pictures, max_side
        self.roots = absolute_roots(roots)

    def documents(
        self, nodes: Sequence[NodeWithScore], room: float = math.inf
    ) -> tuple[list[Block], list[NodeWithScore]]:
        """The blocks of the documents, and those documents that have any, in the order of their numbers.

        A picture that may not be opened, or that can't be read, is left out with a warning in the log; a
        document without text is left out with it.

        Args:
            nodes: documents, best first.
            room: tokens that the blocks may have. From the first document on that has no room, the documents
                are left out, with a warning in the log and a block that says so; the best one never is.
        """
        blocks: list[Block] = []
        shown: list[NodeWithScore] = []
        left = self.max_pictures
        room -= _NOTE
        for position, each in enumerate(nodes):
            picture: Block | None = None
            try:
                source = allowed_picture(each.node, self.roots) if left else None
                if source is not None:
                    picture = self.picture(source)
            except ItemError as error:
                _log.warning("its picture is not shown to the LLM: %s", error.at(name=name_of(each.node)))
            if picture is None and not each.node.get_content(MetadataMode.NONE).strip():
                continue
            parts: list[Block] = [TextBlock(text=f"Document {len(shown) + 1}")]
            if words := _words(each.node):
                parts.append(TextBlock(text=words))
            if picture is not None:
                parts.append(picture)
                left -= 1
            room -= tokens_of(parts) if room < math.inf else 0
            if room < 0 and shown:
                rest = len(nodes) - position
                _log.warning(
                    "%d of %d documents are left out: the context of the LLM (metadata.context_window, less "
                    "metadata.num_output) has no room for them",
                    rest,
                    len(nodes),
                )
                blocks.append(TextBlock(text=f"{rest} further documents were found and had no room here."))
                break
            shown.append(each)
            blocks += parts
        return blocks, shown

    def question(self, text: str, pictures: Sequence[ImageSource]) -> list[Block]:
        """The user's own words and pictures.

        Raises:
            ItemError: a picture can't be read.
        """
        words: list[Block] = [TextBlock(text=text)] if text.strip() else []
        return [*words, *(self.picture(picture) for picture in pictures)]

    def picture(self, source: ImageSource) -> ImageBlock:
        """One picture as a JPEG of at most `max_side` pixels."""
        return ImageBlock(image=as_jpeg(source, self.max_side), image_mimetype="image/jpeg")


def check_whole(name: str, value: object, least: int) -> None:
    """Make sure that an option is a whole number.

    Raises:
        InputError: it is none, or below `least`.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _words(node: BaseNode) -> str:
    """Text and metadata; metadata alone for a picture; and where a page is, if metadata do not say it."""
    text = node.get_content(MetadataMode.NONE).strip()
    words = node.get_content(MetadataMode.LLM) if text else node.get_metadata_str(MetadataMode.LLM)
    if isinstance(node, PageNode) and "page" not in node.metadata:
        words = f"{place_of(node)}\n\n{words}"
    return words.strip()
