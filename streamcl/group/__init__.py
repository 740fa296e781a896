"""Several workers that learn one model together: ranks of `torchrun`, rounds, and what they merge."""
