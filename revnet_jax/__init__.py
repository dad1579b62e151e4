"""Reversible networks in JAX."""
