"""Models: transformers' own classes, cut into pipeline stages, with their weights in Hugging Face format."""
