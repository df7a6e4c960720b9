"""Weights in few bits, put in place of a model's own from outside."""
