"""Supervised fine-tuning: conversations packed into rows, each masked from the others, loss on answers only."""
