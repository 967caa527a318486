"""What Megatron-LM's `pretrain_gpt.py` does in its `__main__`, for checkouts that are not there.

The wheel ships `megatron.training` but not that script. The calls, their order and their arguments are the
script's; forward step and datasets, which it defines itself, are ours.
"""

from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

if __name__ == "__main__":
    args = parse_and_validate_args(
        extra_args_provider=None, args_defaults={"tokenizer_type": "GPT2BPETokenizer"}
    )
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))

    from dsv3_megatron.training.datasets import embedding_ranks, train_valid_test_datasets
    from dsv3_megatron.training.step import forward_step

    pretrain(
        config,
        train_valid_test_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        get_embedding_ranks=embedding_ranks,
    )
