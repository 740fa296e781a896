"""What the engine remembers besides weights: examples to replay."""

from streamcl.memory.replay import Replay

__all__ = ["Replay"]
