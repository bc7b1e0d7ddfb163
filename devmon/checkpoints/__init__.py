"""Series of checkpoints: folders, Hugging Face repositories, weights files."""
