"""Text to training batches: corpus -> tokenizer -> store -> dataset -> batch(step)."""
