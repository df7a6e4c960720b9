"""`danlu synth`: training data that a teacher writes."""
