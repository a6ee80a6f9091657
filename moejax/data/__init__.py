"""Text to batches: source -> tokenizer -> prepare -> pipeline."""
