"""Export of a run, as a Hugging Face model or with the method's own layers."""
