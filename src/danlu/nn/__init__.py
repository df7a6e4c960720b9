"""Parts that model families are assembled from."""
