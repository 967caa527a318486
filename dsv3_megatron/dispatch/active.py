"""What the options of the dispatcher say, for this process."""

from dataclasses import dataclass

__all__ = ["Settings", "activate", "active"]


@dataclass(frozen=True)
class Settings:
    """Attributes:
    node_size: ranks that share a machine, by their global number.
    num_chunks: pieces in which tokens go through the two hops (report §3.2.2: 10 channels).
    communication_sms: SMs that the links may take on NCCL.
    """

    node_size: int = 8
    num_chunks: int = 10
    communication_sms: int = 20


_active = Settings()


def active() -> Settings:
    """What is in force."""
    return _active


def activate(node_size: int, num_chunks: int = 10, communication_sms: int = 20) -> None:
    """Use these for models that are built from now on."""
    global _active
    _active = Settings(node_size, num_chunks, communication_sms)
