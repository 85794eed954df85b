"""Which pictures of a node may be opened, where nobody knows who wrote the node.

Whoever can write to a vector database writes the nodes that come back from it. A file that a node names is
therefore opened only if this process vouches for the node, or if it lies below a folder that the user named.
Pictures that a node holds itself (base64, data URIs) are always fine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TypeAlias

from llama_index.core.schema import BaseNode
from llama_index.embeddings.gme.nodes import item_of, name_of, node_picture

from umr_plugins.errors import ItemError
from umr_plugins.media.roots import absolute_roots, below
from umr_plugins.types import ImageSource, Item, PageImage

Roots: TypeAlias = str | PathLike[str] | Iterable[str | PathLike[str]]
"""One folder or several."""

_VOUCHED = "_umr_vouched"


def vouch(node: BaseNode) -> None:
    """Remember that the file which `node` names now may be opened.

    For nodes that this process has just embedded, and for those of our own store that were marked when they
    were added. The mark is no field of the node: it is neither dumped nor compared, copies have it, and no
    JSON can bring it. It names the file, so a node whose path is changed loses it.
    """
    try:
        picture = node_picture(node)
    except ItemError:
        return  # it names no file, so there is nothing to open
    if isinstance(picture, Path | PageImage):
        node.__dict__[_VOUCHED] = picture


def vouched(node: BaseNode) -> bool:
    """Whether nothing that the node names needs a root: it names no file, or `vouch` has marked it."""
    try:
        picture = node_picture(node)
    except ItemError:
        return False
    return not isinstance(picture, Path | PageImage) or bool(node.__dict__.get(_VOUCHED) == picture)


def allowed_picture(node: BaseNode, roots: Roots = ()) -> ImageSource | None:
    """The picture of a node, unopened, if it may be opened; None for a node that has none.

    Args:
        node: any node; not changed.
        roots: folders below which its file may lie, links followed; a relative path counts from each in
            turn. Nodes that `vouch` has marked need none.

    Raises:
        ItemError: names the node: `unsupported` for a file that may not be opened, and as `item_of`.
    """
    try:
        picture = node_picture(node)
        return None if picture is None else _allowed(node, picture, roots)
    except ItemError as error:
        raise error.at(name=name_of(node)) from None


def allowed_item(node: BaseNode, roots: Roots = ()) -> Item:
    """`item_of` for a node of which nobody knows who wrote it; see `allowed_picture`."""
    item = item_of(node)
    if item.image is None:
        return item
    try:
        return replace(item, image=_allowed(node, item.image, roots))
    except ItemError as error:
        raise error.at(name=name_of(node)) from None


def _allowed(node: BaseNode, picture: ImageSource, roots: Roots) -> ImageSource:
    if not isinstance(picture, Path | PageImage) or node.__dict__.get(_VOUCHED) == picture:
        return picture
    path = picture if isinstance(picture, Path) else Path(picture.path)
    found = below(path, absolute_roots(roots), origin="A node", remedy="roots=[folder]")
    return found if isinstance(picture, Path) else PageImage(found, picture.page)
