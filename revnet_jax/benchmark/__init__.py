"""Measures time, memory and exactness of training steps, under every strategy."""
