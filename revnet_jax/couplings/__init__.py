"""A study of all couplings of the core, on one small network."""
