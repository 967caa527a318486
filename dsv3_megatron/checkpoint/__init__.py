"""What a run begins with: which checkpoint, what it was trained with, and whether this run has the same model.

Everything here is read before a process group, a model or a data set exists, without Megatron.
"""
