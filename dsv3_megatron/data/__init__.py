"""Real data: text or JSONL to a tokenizer and Megatron indexed datasets (`python -m
dsv3_megatron.data.prepare`)."""
