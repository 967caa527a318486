"""`make demo-rl`: a base model trained here learns to sort digits from rewards alone."""
