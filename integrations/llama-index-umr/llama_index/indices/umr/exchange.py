"""The order in which new nodes of documents come in and old ones go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from llama_index.core.schema import BaseNode
from llama_index.indices.umr.identity import Held, document_of, with_parts


class Exchange:
    """Which old nodes may go while the new nodes of documents come in.

    The new ones first: a kill or an error in between leaves both, which the next refresh sees, never neither.
    Each new node says how many the document has, so the next refresh sees too when only some have come.

    Args:
        names: ids of the documents.
        given: their new nodes.
        nodes: those of them that are to be stored.
    """

    def __init__(self, names: Sequence[str], given: Sequence[BaseNode], nodes: Sequence[BaseNode]) -> None:
        self.names = list(names)
        self.stored: set[str] = set()
        """Ids of the documents that have arrived."""
        self._nodes = nodes
        self._batch: Sequence[BaseNode] = ()
        self._parts = Counter(map(document_of, nodes))
        self._given = set(map(document_of, given))
        self._last = {document_of(node): at for at, node in enumerate(nodes)}
        self._new_ids: set[str] = set()
        self._done = 0
        self._leaving = list(names)

    def batches(self, size: int) -> Iterator[Sequence[BaseNode]]:
        """The new nodes, at least one batch, in groups of at most `size`."""
        for start in range(0, max(len(self._nodes), 1), size):
            batch = self._nodes[start : start + size]
            self._done = start + len(batch)
            self._batch = batch
            yield batch

    def arriving(self, embedded: Sequence[BaseNode]) -> list[str]:
        """Documents whose first nodes are among those to be stored now, which are told of how many they are.

        Nodes of the batch that are not among them were left out and do not count. Where all that comes last
        of a document is left out in a batch of its own, the next refresh embeds the document again.
        """
        known = set(self.names)
        self._parts -= Counter(map(document_of, self._batch)) - Counter(map(document_of, embedded))
        for node in embedded:
            if document_of(node) in known:
                with_parts(node, self._parts[document_of(node)])
        found = dict.fromkeys(name for node in embedded if (name := document_of(node)) in known)
        first = [name for name in found if name not in self.stored]
        self.stored.update(first)
        self._new_ids.update(node.node_id for node in embedded)
        return first

    def stale(self, held: Mapping[str, Held] | None) -> list[str]:
        """Old nodes of the documents that have arrived whole since the last call.

        A document of which every node was left out keeps its old ones.
        """
        finished = [name for name in self._leaving if self._last.get(name, -1) < self._done]
        self._leaving = [name for name in self._leaving if name not in set(finished)]
        return [
            node_id
            for name in finished
            if name in self.stored or name not in self._given
            for node_id in dict.fromkeys(ids_of(name, held))
            if node_id not in self._new_ids
        ]


def ids_of(name: str, held: Mapping[str, Held] | None) -> list[str]:
    """Ids of the nodes of a document, and its own, which the node may have that it was without a source."""
    return [*(held[name].nodes if held and name in held else []), name]
