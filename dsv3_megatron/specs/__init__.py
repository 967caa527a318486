"""`--spec dsv3`: DeepSeek-V3's layers as Megatron specs (MLA, MoE, MTP) over two backends.

`dsv3` is the decoder's spec function, `mtp_spec` that of multi-token prediction. Importing this package
installs `mtp_block_spec`, since Megatron takes the MTP block from elsewhere, and what makes losses the same in
every layout (MTP) and after a resume (`dataset_loss_mask`).
"""

from dsv3_megatron.arguments.unpatched import when_specs_are_imported
from dsv3_megatron.patching import install
from dsv3_megatron.specs.block import dsv3, mtp_spec

__all__ = ["dsv3", "mtp_spec"]

install(["mtp_block_spec", "mtp_loss", "mtp_loss_logging", "dataset_loss_mask"])
when_specs_are_imported()
