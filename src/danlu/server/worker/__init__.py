"""The process of one model. `__main__.py` is its program."""
