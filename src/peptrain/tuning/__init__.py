"""Fine-tuning on classification and similarity: tasks, examples, metrics."""
