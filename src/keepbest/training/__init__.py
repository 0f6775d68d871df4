"""The small trainer.

`Trainer` is in `keepbest.training.trainer`, the configs are in `keepbest.training.config`. This package imports nothing
itself, because callbacks need some of its modules and the trainer needs callbacks.
"""
