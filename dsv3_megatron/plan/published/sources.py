"""Where the runs were published."""

PAPER = "arXiv 2603.07685 (Scalable Training of MoE Models with Megatron Core)"
BRIDGE = "NVIDIA-NeMo/Megatron-Bridge performance summary"
DGXC = "NVIDIA/dgxc-benchmarking deepseek_v3"
GUIDE = "Megatron-LM, Optimizing DeepSeek-V3 Training Performance on NVIDIA GB200 NVL72 (2025-11)"
GOLDEN = "Megatron-LM golden values, deepseekv3_proxy_flex_tp1pp4emp16etp1cp1_release"
PROXY_2048_TOKENS = "Megatron-LM #6311 and #6429"
SIMUMAX = "SimuMax v1.2, B200 release summary"
