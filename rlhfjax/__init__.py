"""rlhfjax: from preference data to trained policy, in JAX.

Import what you need from the floors (`rlhfjax.losses`, `rlhfjax.models`, `rlhfjax.rl`, ...);
importing this package alone loads nothing else.
"""

__version__ = "0.1.0"
