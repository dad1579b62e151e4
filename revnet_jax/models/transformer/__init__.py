"""Transformers: the decoder of language models, and vision transformers."""
