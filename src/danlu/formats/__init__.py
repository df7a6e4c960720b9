"""Weights, cards and folders at rest."""
