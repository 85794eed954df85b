"""Our models inside Chroma's own collections: an embedding function, a picture loader, and safe opening.

Importing this package imports chromadb and registers `UMREmbeddingFunction` there; nothing else in the
library imports it. Where no collection of your own is needed, `umr_plugins.Index` does more.

>>> from umr_plugins.chroma import UMREmbeddingFunction, UMRImageLoader, create_collection
>>> function, loader = UMREmbeddingFunction("umr-tiny"), UMRImageLoader(roots=["photos"])
>>> collection = create_collection(client, "photos", function, data_loader=loader)  # doctest: +SKIP
>>> collection.add(ids=["a", "b"], uris=["cat.jpg", "dog.jpg"])  # doctest: +SKIP
>>> collection.query(query_texts=["a sleeping cat"], n_results=1)["ids"]  # doctest: +SKIP
[['a']]
"""

from umr_plugins.chroma.function import UMREmbeddingFunction
from umr_plugins.chroma.loader import UMRImageLoader
from umr_plugins.chroma.opening import create_collection, open_collection

__all__ = ["UMREmbeddingFunction", "UMRImageLoader", "create_collection", "open_collection"]
