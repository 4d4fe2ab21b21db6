"""Formulas as pure functions of tensors and numbers."""
