"""The messages of a pipeline: one interface, carried by NCCL or by gloo.

Both execute the list of `dsv3_megatron.pipeline.host_operations`, which says who posts what and when; docs/dualpipe.md
("Messages") says why NCCL's list is in batches and gloo's is not.
"""

from dsv3_megatron.dualpipe.p2p.communicators import all_pipelines, carrier, warm_up
from dsv3_megatron.dualpipe.p2p.pipeline import MAX_CTAS, PipelineP2P, late_message
from dsv3_megatron.dualpipe.p2p.transport import PipelineTimeout, TensorSpec

__all__ = [
    "MAX_CTAS",
    "PipelineP2P",
    "PipelineTimeout",
    "TensorSpec",
    "all_pipelines",
    "carrier",
    "late_message",
    "warm_up",
]
