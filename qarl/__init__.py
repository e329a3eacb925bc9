"""QaRL: reinforcement learning of language models with low-bit rollouts and an aligned learner."""

__version__ = "0.1.0"
