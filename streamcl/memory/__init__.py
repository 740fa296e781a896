"""What the engine remembers besides weights: examples to replay, and the errors of a short time ago."""

from streamcl.memory.error import ErrorMemory, Vectors
from streamcl.memory.replay import Replay

__all__ = ["ErrorMemory", "Replay", "Vectors"]
