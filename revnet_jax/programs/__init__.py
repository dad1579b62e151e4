"""Reads compiled programs: bytes moved, collectives, operations, buffers, liveness."""
