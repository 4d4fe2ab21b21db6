"""What a pass over a model says before it is unlearned."""
