"""The token before a text that is no conversation: prompts and pairs without a chat template begin alike."""

__all__ = ["TEXT_BEGINS"]

# The begin token, or the end token of a document before it, which is what a model trained on documents has seen there.
TEXT_BEGINS = ("begin", "end")
