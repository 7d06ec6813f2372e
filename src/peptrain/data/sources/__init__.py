"""Sources of text: files, Parquet, Hugging Face datasets, and mixtures of them."""
