"""Losses and their parts as small pure tensor functions."""
