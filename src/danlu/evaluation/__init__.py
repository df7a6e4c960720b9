"""What a model is worth: bits per byte against classical compressors, and whether the code it writes parses."""
