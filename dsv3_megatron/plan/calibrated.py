"""What the second fit of `calibration.py` gives besides the hardware table."""

# Tokens of the fullest expert-parallel rank against the mean, in DeepSeek-V3's training. The routing of public
# benchmarks is forced to be even: 1.
LOAD_IMBALANCE = 1.075
