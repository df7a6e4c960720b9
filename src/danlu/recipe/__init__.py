"""Recipes: several verbs in a row, each stage's output feeding the next."""
