"""The module classes that one set of specs is built from: plain PyTorch (`reference`) and Transformer Engine (`te`)."""
