"""Exponential moving average of the weights, kept in CPU memory and updated beside the training (report §3.2.3).

Turned on by `--ema-decay`; `--eval-ema` evaluates and exports the average. docs/ema.md.
"""
