"""`make demo-rl`: a base model trained here learns to count from rewards alone."""
