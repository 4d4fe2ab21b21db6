"""Erasure requests and their evidence."""
