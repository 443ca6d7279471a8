"""Weights of other libraries' models, in both directions."""
