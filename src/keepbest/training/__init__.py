"""A small trainer, for users who have none.

`Trainer` is in `keepbest.training.trainer` and the configs are in `keepbest.training.config`. The package itself
imports nothing, because callbacks need some of its modules and the trainer needs callbacks.
"""
