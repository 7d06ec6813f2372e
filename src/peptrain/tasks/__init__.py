"""Zero-shot tasks of the papers: BLiMP, multiple choice, the last word, perplexity per byte."""
