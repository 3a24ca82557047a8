"""A run around the model: flags, training step, evaluation, what is saved of it, what is shown.

Read `training_step` and `evaluation` first, then `state` (what a run saves and how it goes on).
"""
