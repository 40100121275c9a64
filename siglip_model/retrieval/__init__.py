"""Search over files of embeddings by text and by image."""

from siglip_model.retrieval.approximate import ApproximateIndex
from siglip_model.retrieval.collection import Collection
from siglip_model.retrieval.exact import nearest
from siglip_model.retrieval.searcher import Found, Hit, Searcher, search

__all__ = ["ApproximateIndex", "Collection", "Found", "Hit", "Searcher", "nearest", "search"]
