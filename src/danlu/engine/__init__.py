"""Text out of a model: sampling, batch generation with a KV cache, streaming, chat."""
