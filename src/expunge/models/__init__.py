"""Checkpoints, and the decoder as a list of layers."""
