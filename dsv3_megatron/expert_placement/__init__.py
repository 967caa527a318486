"""Experts placed by their load in training: `--expert-placement balanced` (docs/balance.md).

Every N steps the experts of each MoE layer are dealt out anew to the ranks of their expert-parallel group, by the load
of those steps (`dsv3_megatron.balance`): weights, fp32 masters and moments move, the router does not know it, and
no sum changes its order, so the losses are the same to the bit.

    arguments.py   the options
    layers.py      the MoE layers of this rank: which slot holds which expert
    alltoall.py    Megatron's all-to-all dispatcher with experts that are not at home
    pieces.py      which piece of which tensor goes from which rank to which (pure)
    carry.py       the tensors of experts, and their way to other ranks
    trainer.py     counts the load, decides, moves; home before a checkpoint, and back
"""

__all__ = ["install"]


def install() -> None:
    """Follow `--expert-placement` in this process; without it nothing changes."""
    from dsv3_megatron.expert_placement import trainer
    from dsv3_megatron.training import hooks

    hooks.after_validation(trainer.use)
