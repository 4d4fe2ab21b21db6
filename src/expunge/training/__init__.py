"""A run in memory."""
