"""Every equation of the library: arrays in, unreduced arrays out. Needs jax and chex only, so it can be lifted out.

preference   bradley_terry_loss, soft_bradley_terry_loss, rao_kupper_loss (ties), cost_loss, score_regularization
policy       ppo_clip_loss, clipped_value_loss, reinforce_loss, kl_k1, kl_k2, kl_k3, entropy
advantages   kl_shaped_rewards, kl_shaped_rewards_and_costs, gae, discounted_returns, whiten, adaptive_kl_coef
lagrange     mixed_advantages, multiplier_loss, clamp_log_lambda, moving_average; tempered_policy, reachable_cost,
             check_limit (what the dual converges to, and whether it can)
games        self_play_rewards, exploitability, hedge_update

Conventions. Arrays come first, options are keyword-only, leading dimensions are free. All arrays of a call have equal
shapes and float dtypes (integers are an error); bfloat16 is raised to float32 at the door, and **results are float32
at least**: a reduction over tokens in bfloat16 would lose its small terms. Reduce with `rlhfjax.masked`.
"""

from rlhfjax.losses.advantages import (
    adaptive_kl_coef,
    discounted_returns,
    gae,
    kl_shaped_rewards,
    kl_shaped_rewards_and_costs,
)
from rlhfjax.losses.games import exploitability, hedge_update, self_play_rewards
from rlhfjax.losses.lagrange import (
    check_limit,
    clamp_log_lambda,
    mixed_advantages,
    moving_average,
    multiplier_loss,
    reachable_cost,
    tempered_policy,
)
from rlhfjax.losses.policy import clipped_value_loss, entropy, kl_k1, kl_k2, kl_k3, ppo_clip_loss, reinforce_loss
from rlhfjax.losses.preference import (
    bradley_terry_loss,
    cost_loss,
    rao_kupper_loss,
    score_regularization,
    soft_bradley_terry_loss,
)
from rlhfjax.masked import whiten

__all__ = [
    "adaptive_kl_coef", "bradley_terry_loss", "check_limit", "clamp_log_lambda", "clipped_value_loss", "cost_loss",
    "discounted_returns", "entropy", "exploitability", "gae", "hedge_update", "kl_k1", "kl_k2", "kl_k3",
    "kl_shaped_rewards", "kl_shaped_rewards_and_costs", "mixed_advantages", "moving_average", "multiplier_loss",
    "ppo_clip_loss", "rao_kupper_loss", "reachable_cost", "reinforce_loss", "score_regularization",
    "self_play_rewards", "soft_bradley_terry_loss", "tempered_policy", "whiten",
]
