"""Tokenizers, corpora, token shards and the global batch."""
