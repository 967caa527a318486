"""Dispatch and combine alone, as published."""

# Table 7 of the paper: microseconds of dispatch and combine alone, hidden 7168, 4096 tokens, 256 experts, HybridEP.
# Megatron's BF16 both ways.
ALL_TO_ALL_US = {
    ("h100", 8): (661, 624),
    ("h100", 16): (1485, 1688),
    ("h100", 32): (3064, 3088),
    ("h100", 64): (4626, 4398),
    ("gb200", 8): (391, 353),
    ("gb200", 16): (578, 527),
    ("gb200", 32): (612, 646),
    ("gb200", 64): (675, 744),
}
