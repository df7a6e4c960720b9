"""What numbers cost: the formats weights are kept in, and the memory, work and time a model needs."""
