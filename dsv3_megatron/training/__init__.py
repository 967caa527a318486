"""What `megatron.training.pretrain` is given: batches, the forward step with its loss, and the datasets."""
