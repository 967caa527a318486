"""The released DeepSeek-V3 weights in and out of Megatron, streaming (docs/convert.md).

python -m dsv3_megatron.convert hf-to-megatron --input DIR --output DIR
python -m dsv3_megatron.convert megatron-to-hf --input DIR --output DIR
python -m dsv3_megatron.convert verify --hf DIR --megatron DIR --json
"""
