"""Keep the best checkpoints of a distributed PyTorch run."""

from keepbest.iteration import TrainingIteration

__all__ = ["TrainingIteration"]
