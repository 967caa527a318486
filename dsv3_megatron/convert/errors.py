"""What stops a conversion: the text names the file, the tensor and what to do."""

from dsv3_megatron.errors import RefusedArgument

__all__ = ["ConversionError"]


class ConversionError(RefusedArgument):
    """A checkpoint that cannot be converted as it is, or an output that cannot be written."""
