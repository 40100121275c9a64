"""Texts to token ids: SigLIP's SentencePiece tokenizer and SigLIP 2's Gemma tokenizer."""
