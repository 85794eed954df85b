"""A retrieved PDF page, whose picture is rendered only when somebody looks at it."""

from __future__ import annotations

import base64
import io
from hashlib import sha256
from pathlib import Path

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import ImageNode

from umr_plugins.media.images import load_image
from umr_plugins.types import PageImage


class PageNode(ImageNode):
    """One page of a PDF file as an `ImageNode`: `text` is its text layer, `image` its picture.

    `image` (base64 PNG) is rendered on first use and never dumped, so that a search over ten thousand
    pages renders none of them.

    Args:
        page_path: absolute path of the PDF file.
        page: page number, counted from 1.
    """

    page_path: str = Field(description="Absolute path of the PDF file.")
    page: int = Field(description="Page number, counted from 1.", ge=1)

    _rendered: str | None = PrivateAttr(default=None)

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serialises the class."""
        return "PageNode"

    @property
    def page_image(self) -> PageImage:
        """The page as the core library names it."""
        return PageImage(Path(self.page_path), self.page)

    @property
    def hash(self) -> str:
        """Of the page's place and text; renders nothing."""
        return sha256(
            f"{self.page_path}-{self.page}-{self.text}".encode("utf-8", "surrogatepass")
        ).hexdigest()


def _get_image(node: PageNode) -> str | None:
    given: str | None = node.__dict__.get("image")
    if given is None and node._rendered is None:
        encoded = io.BytesIO()
        load_image(node.page_image).save(encoded, format="PNG")
        node._rendered = base64.b64encode(encoded.getvalue()).decode("ascii")
    return given or node._rendered


def _set_image(node: PageNode, value: str | None) -> None:
    node.__dict__["image"] = value


# LlamaIndex reads the field `image` directly in many places (chat engines, content blocks). A property set
# after the class was built is a data descriptor, so it answers those reads; dumps see the empty field.
PageNode.image = property(_get_image, _set_image)  # type: ignore[assignment]
