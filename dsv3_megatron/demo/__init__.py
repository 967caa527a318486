"""`python -m dsv3_megatron.demo`: a small DeepSeek-V3 learns real text on a machine without a GPU."""
