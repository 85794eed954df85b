"""What can be wrong with a node before any model sees it: two pictures, or a useless vector of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from llama_index.core.schema import BaseNode, ImageNode, Node
from llama_index.embeddings.gme.nodes import name_of, node_picture
from llama_index.embeddings.gme.pages import PageNode

from umr_plugins.errors import ItemError
from umr_plugins.media.images import content_key, load_image
from umr_plugins.types import ImageSource


def check_picture(node: BaseNode) -> None:
    """Make sure that a node which holds picture bytes and names a file means the same picture by both.

    LlamaIndex shows the bytes to some readers and the file to others, so one picture would be embedded and
    the other shown. Bytes count where the file can't be read; a URL beside either is not looked at.

    Raises:
        ItemError: `unsupported`, names the node.
    """
    path = _second_place(node)
    held = None if path is None else node_picture(node)
    if path is None or held is None:
        return
    try:
        same = content_key(path) == content_key(held) or _pixels(path) == _pixels(held)
    except ItemError:
        return  # the file is gone, or the model will say what is wrong with the bytes
    if not same:
        raise ItemError(
            "unsupported",
            f"the node holds one picture and names the file of another ({path}), or the same compressed with "
            "loss; give one of them, or make two nodes",
            name=name_of(node),
        )


def check_vector(node: BaseNode, dim: int | None = None) -> None:
    """Make sure that the vector a node brings can be searched.

    Args:
        node: a node whose `embedding` is set.
        dim: length that the vector must have, where it is known.

    Raises:
        ItemError: names the node.
    """
    vector = np.asarray(node.embedding, dtype=np.float64)
    if dim is not None and vector.shape != (dim,):
        reason = f"the node brings a vector of {vector.size} numbers, and the others have {dim}"
    elif not np.isfinite(vector).all():
        reason = "the node brings a vector with NaN or infinity"
    elif not vector.any():
        reason = "the node brings a vector of zeros, which is near to nothing"
    else:
        return
    remedy = "set node.embedding to None to have it embedded"
    raise ItemError("unsupported", f"{reason}; {remedy}", stage="store", name=name_of(node))


def _pixels(picture: ImageSource) -> tuple[tuple[int, int], bytes]:
    decoded = load_image(picture)
    return decoded.size, decoded.tobytes()


def _second_place(node: BaseNode) -> Path | None:
    """The file that a node names besides the picture bytes that it holds."""
    if isinstance(node, PageNode):
        return None
    if isinstance(node, ImageNode):
        return Path(node.image_path) if node.image and node.image_path else None
    resource = node.image_resource if isinstance(node, Node) else None
    return Path(resource.path) if resource is not None and resource.data and resource.path else None
