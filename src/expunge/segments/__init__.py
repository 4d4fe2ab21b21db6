"""A few layers of a model that run alone."""
