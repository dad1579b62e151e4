"""Optimizers and learning-rate schedules, low-precision states, updates in lockstep."""
