"""Evaluation through EleutherAI's lm-evaluation-harness (extra `eval`), of models on disk and of models in training.

`model` is the harness's model over token ids; `scorer` says what it asks of whoever holds the weights: the inference
engine (`engine_scorer`) or the trainer's own pipeline (`trainer_scorer`). `catalog` finds tasks, ours (`tasks/`) and
the harness's. Nothing is imported before it is asked for.
"""
