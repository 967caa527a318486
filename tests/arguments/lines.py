"""Command lines that the tests start from."""

# A valid micro model: 4 layers, the first dense; 8 experts in 4 groups. Words after the program's name.
_MICRO = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --q-lora-rank 16 "
    "--kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16 --num-experts 8 "
    "--moe-layer-freq [0]*1+[1]*3 --moe-ffn-hidden-size 32 --moe-router-topk 4 --moe-router-num-groups 4 "
    "--moe-router-group-topk 2 --vocab-size 128 --seq-length 32 --init-method-std 0.02 --mock-data "
    "--micro-batch-size 1 --global-batch-size 8 --train-iters 3 --eval-iters 0 --lr 1e-3 --num-workers 0"
)
MICRO = _MICRO.split()


def whole_mock_data() -> None:
    """In a rank, before it trains: Megatron's own mock data, of which the harness leaves a fiftieth."""
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

    MockGPTLowLevelDataset.size = 100_000
