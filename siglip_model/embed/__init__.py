"""Bulk embedding: any number of images or texts into files that can be searched, resumable, in constant memory."""

from siglip_model.embed.file import EmbeddingFileError, Embeddings
from siglip_model.embed.output import load_embeddings
from siglip_model.embed.run import EmbeddingInterrupted, EmbedSummary, embed_images, embed_texts

__all__ = [
    "EmbedSummary",
    "EmbeddingFileError",
    "EmbeddingInterrupted",
    "Embeddings",
    "embed_images",
    "embed_texts",
    "load_embeddings",
]
