"""Attacks on an unlearned model, and the verdict."""
