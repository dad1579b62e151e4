"""Training: one step, the loop around it, devices and processes."""
