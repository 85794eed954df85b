"""What an LLM is shown: documents, pictures and the question, as blocks of one message."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from llama_index.core.base.llms.types import ImageBlock, TextBlock
from llama_index.core.schema import MetadataMode, NodeWithScore
from llama_index.embeddings.gme.nodes import name_of
from llama_index.embeddings.gme.roots import Roots, allowed_picture

from umr_plugins.errors import InputError, ItemError
from umr_plugins.media.jpeg import MAX_SIDE, as_jpeg
from umr_plugins.media.roots import absolute_roots
from umr_plugins.types import ImageSource

_log = logging.getLogger(__name__)

Block = TextBlock | ImageBlock


class Blocks:
    """Writes documents and questions as blocks that chat models read.

    Every document comes under its number, with its text and metadata and with its picture. Pictures are
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
        if max_pictures < 0 or max_side < 1:
            raise InputError(
                f"max_pictures must be at least 0 and max_side at least 1, got {max_pictures} and {max_side}"
            )
        self.max_pictures, self.max_side = max_pictures, max_side
        self.roots = absolute_roots(roots)

    def documents(self, nodes: Iterable[NodeWithScore]) -> tuple[list[Block], list[NodeWithScore]]:
        """The blocks of the documents, and those documents that have any, in the order of their numbers.

        A picture that may not be opened, or that can't be read, is left out with a warning in the log.
        """
        blocks: list[Block] = []
        shown: list[NodeWithScore] = []
        left = self.max_pictures
        for each in nodes:
            parts: list[Block] = []
            if each.node.get_content(MetadataMode.NONE).strip():
                parts.append(TextBlock(text=each.node.get_content(MetadataMode.LLM)))
            try:
                picture = allowed_picture(each.node, self.roots) if left else None
                if picture is not None:
                    parts.append(self.picture(picture))
                    left -= 1
            except ItemError as error:
                _log.warning("its picture is not shown to the LLM: %s", error.at(name=name_of(each.node)))
            if parts:
                shown.append(each)
                blocks += [TextBlock(text=f"Document {len(shown)}"), *parts]
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
