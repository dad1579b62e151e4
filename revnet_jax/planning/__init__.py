"""Predicts memory and time of training steps from programs compiled for any device."""
