"""What text is read from: files, Parquet, datasets of the Hugging Face hub, mixtures."""
