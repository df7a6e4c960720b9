"""From text to token ids and back, and from chat turns to the text a model reads."""
