"""Model families, each assembled from `danlu.nn`, with the map to its Hugging Face checkpoint layout."""
