"""PPO for language models, plain and Lagrangian: one rollout batch in, one updated state out.

    prompts -> rollout -> feedback(rollout, key) -> scores [B] (and costs [B]) -> step(state, ...) -> state

Both algorithms share everything but the advantage: plain PPO (one critic) uses A_r, Lagrangian PPO (Safe RLHF,
2310.12773; a second critic and a multiplier) uses (A_r - lambda A_c) / (1 + lambda).

Policy and critics may be adapted (`models.lora`): then their frozen weights are the reference policy's.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax import losses, masked
from rlhfjax.models.lora import bind
from rlhfjax.models.transformer import Model
from rlhfjax.parallel.mesh import constrain
from rlhfjax.rl.multiplier import Multiplier, MultiplierState
from rlhfjax.rl.sampling import response_logprobs
from rlhfjax.rl.sft import next_token_nll
from rlhfjax.types import Demonstrations, Params, Rollout, TrainState, before_response_tokens, pytree, sequences

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """What one PPO update does with one rollout batch."""

    kl_coef: float = 0.02
    """beta of the KL penalty to the reference policy (Safe RLHF's public code: 0.02)."""
    clip: float = 0.2
    """PPO's ratio clip (HH-RLHF and Safe RLHF's public code: 0.2)."""
    value_clip: float = 5.0
    """Range within which a critic may move from its old value (Safe RLHF's public code: 5)."""
    reward_clip: float | None = 50.0
    """Bound on each token's shaped reward and cost (Safe RLHF's public code: 50)."""
    gamma: float = 1.0
    """Discount per token."""
    gae_lambda: float = 0.95
    """Decay of generalised advantage estimation."""
    num_epochs: int = 1
    """Passes over the rollout batch."""
    num_minibatches: int = 4
    """Optimiser steps per pass."""
    num_accumulation: int = 1
    """Pieces in which a minibatch's gradient is summed: memory only, the result is the same to rounding."""
    whiten_advantages: bool = True
    """Whiten advantages over the batch's response tokens, after mixing (lm-human-preferences: yes; Safe RLHF: no)."""
    ptx_coef: float = 0.0
    """Weight of the next-token loss on demonstrations (Safe RLHF's public code: 16)."""
    unfinished_penalty: float = 0.0
    """Subtracted from the score of a response that did not end; it is scored at its last token either way."""
    temperature: float = 1.0
    """Temperature of the rollouts: logits are divided by it wherever a log-probability is taken."""

    def __post_init__(self):
        for field, low in (("num_epochs", 1), ("num_minibatches", 1), ("num_accumulation", 1)):
            if getattr(self, field) < low:
                raise ValueError(f"{field} must be at least {low}, got {getattr(self, field)}")
        for field in ("kl_coef", "ptx_coef", "unfinished_penalty"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ValueError(f"{field} must be finite and not negative, got {getattr(self, field)}")
        for field in ("clip", "value_clip", "temperature", *["reward_clip"] * (self.reward_clip is not None)):
            if not 0 < getattr(self, field) < float("inf"):
                raise ValueError(f"{field} must be positive and finite, got {getattr(self, field)}")
        for field in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} must lie in [0, 1], got {getattr(self, field)}")

    def check_batch(self, num_rows: int) -> None:
        """Raise unless `num_rows` responses divide into the minibatches and their pieces."""
        if num_rows % (self.num_minibatches * self.num_accumulation):
            raise ValueError(f"{num_rows} responses do not divide into {self.num_minibatches} minibatches of "
                             f"{self.num_accumulation} pieces")  # fmt: skip


def reinforce(kl_share: float = 0.05, **fields) -> PPOConfig:
    """RLAIF's learner (2309.00267): REINFORCE with a learned baseline for `(1 - b) r - b KL`, `b = kl_share`.

    It is PPO in one step per rollout batch: there the ratio is 1, and the gradient of the clipped surrogate is the
    policy gradient `-(Z_t - V_t) grad log pi` with undiscounted returns to go `Z_t` (gae_lambda 1) of the reward minus
    the penalty. The objective is divided by 1 - b, so that scores keep their units.
    """
    if not 0 <= kl_share < 1:
        raise ValueError(f"kl_share must lie in [0, 1), got {kl_share}")
    one_step = dict(num_epochs=1, num_minibatches=1, gae_lambda=1.0, whiten_advantages=False, value_clip=1e6)
    return PPOConfig(kl_coef=kl_share / (1 - kl_share), reward_clip=None, **one_step, **fields)


@pytree
class PPOState:
    """Everything plain PPO changes."""

    policy: TrainState
    critic: TrainState


@pytree
class LagrangianPPOState:
    """Everything Lagrangian PPO changes: three networks and the multiplier."""

    policy: TrainState
    critic: TrainState
    cost_critic: TrainState
    multiplier: MultiplierState


class Algorithm(NamedTuple):
    """`init(policy_params, ...) -> state`; `step(state, ref_params, rollout, *feedback, key=, ptx=)`.

    logical_axes(): those of each learner's parameters, under its field of the state. policy: the network that
    `state.policy` holds the parameters of, if it is an adapted one.
    """

    init: Callable[..., Any]
    step: Callable[..., tuple[Any, Metrics]]
    logical_axes: Callable[[], Mapping[str, Any]] = dict
    policy: Model | None = None


@pytree
class _Experience:
    """What the minibatches are cut from, `[B, ...]`: fixed while the networks move."""

    rollout: Rollout
    old_logprobs: jax.Array
    advantages: jax.Array
    targets: dict[str, tuple[jax.Array, jax.Array]]  # critic name -> (old values, returns), each [B, T]
    ptx: Demonstrations | None = None


def response_values(critic: Model, params: Params, rollout: Rollout) -> jax.Array:
    """`values[b, t]`: the critic's output *before* response token t is emitted, `[B, T]`."""
    num_tokens = rollout.tokens.shape[-1]
    outputs, _ = critic.apply(params, *sequences(rollout), num_outputs=num_tokens + 1)
    return before_response_tokens(outputs, num_tokens)


def make_ppo(
    policy: Model,
    critic: Model,
    policy_optimizer: optax.GradientTransformation,
    critic_optimizer: optax.GradientTransformation,
    config: PPOConfig,
) -> Algorithm:
    """Plain PPO with a KL penalty: `step(state: PPOState, ref_params, rollout, scores, *, key, ptx=None)`.

    scores `[B]` floats, higher is better. The whole penalty beta sits on the reward.
    Source: PPO for language models (lm-human-preferences; HH-RLHF 2204.05862 section 4).
    """
    optimizers = {"policy": policy_optimizer, "critic": critic_optimizer}

    def init(policy_params: Params, critic_params: Params) -> PPOState:
        return PPOState(
            policy=TrainState.create(policy_params, policy_optimizer),
            critic=TrainState.create(critic_params, critic_optimizer),
        )

    def step(state: PPOState, ref_params, rollout, scores, *, key, ptx=None) -> tuple[PPOState, Metrics]:
        actor, judge = bind(policy, ref_params), bind(critic, ref_params)
        old, ref, metrics = _logprobs(actor, state.policy.params, policy.base or policy, ref_params, rollout, config)
        scores = _penalise_unfinished(scores, rollout, config)
        rewards = losses.kl_shaped_rewards(
            scores, old, ref, rollout.mask, kl_coef=config.kl_coef, clip=config.reward_clip
        )
        values = response_values(judge, state.critic.params, rollout)
        advantages, returns = _gae(rewards, values, rollout, config)
        metrics |= {"score": jnp.mean(scores)} | _critic_metrics("critic", values, returns, rollout)
        learners, update_metrics = _train(
            {"policy": state.policy, "critic": state.critic},
            optimizers,
            _loss_functions(actor, {"critic": judge}, config),
            _experience(rollout, old, advantages, {"critic": (values, returns)}, ptx, config),
            key,
            config,
        )
        return PPOState(**learners), metrics | update_metrics

    logical_axes = lambda: {"policy": policy.logical_axes(), "critic": critic.logical_axes()}
    return Algorithm(init, step, logical_axes, policy)


def make_lagrangian_ppo(
    policy: Model,
    critic: Model,
    policy_optimizer: optax.GradientTransformation,
    critic_optimizer: optax.GradientTransformation,
    config: PPOConfig,
    multiplier: Multiplier,
) -> Algorithm:
    """Safe RLHF: `step(state: LagrangianPPOState, ref_params, rollout, scores, costs, *, key, ptx=None)`.

    scores `[B]`: higher is more helpful; costs `[B]`: higher is more harmful. Both critics share `critic`'s shape.
    The KL penalty is split evenly over the two streams (r - beta/2 KL, c + beta/2 KL), so that its weight in the mixed
    advantage does not depend on lambda. The multiplier moves once per rollout batch, before the actor, on the *raw*
    costs. Source: Safe RLHF (2310.12773) section 3.2 and its public code.
    """
    optimizers = {"policy": policy_optimizer, "critic": critic_optimizer, "cost_critic": critic_optimizer}

    def init(policy_params: Params, critic_params: Params, cost_critic_params: Params) -> LagrangianPPOState:
        return LagrangianPPOState(
            policy=TrainState.create(policy_params, policy_optimizer),
            critic=TrainState.create(critic_params, critic_optimizer),
            cost_critic=TrainState.create(cost_critic_params, critic_optimizer),
            multiplier=multiplier.init(),
        )

    def step(
        state: LagrangianPPOState, ref_params, rollout, scores, costs, *, key, ptx=None
    ) -> tuple[LagrangianPPOState, Metrics]:
        _check_signal("costs", costs, rollout)
        multiplier_state = multiplier.update(state.multiplier, costs)
        actor, judge = bind(policy, ref_params), bind(critic, ref_params)
        old, ref, metrics = _logprobs(actor, state.policy.params, policy.base or policy, ref_params, rollout, config)
        scores = _penalise_unfinished(scores, rollout, config)
        rewards, cost_rewards = losses.kl_shaped_rewards_and_costs(
            scores, costs, old, ref, rollout.mask, kl_coef=config.kl_coef, clip=config.reward_clip
        )
        values = response_values(judge, state.critic.params, rollout)
        cost_values = response_values(judge, state.cost_critic.params, rollout)
        advantages, returns = _gae(rewards, values, rollout, config)
        cost_advantages, cost_returns = _gae(cost_rewards, cost_values, rollout, config)
        mixed = losses.mixed_advantages(advantages, cost_advantages, multiplier_state.log_lambda)
        metrics |= {
            "score": jnp.mean(scores),
            "cost": jnp.mean(costs),
            "cost_average": multiplier_state.cost_average,
            "cost_excess": multiplier_state.cost_average - multiplier.limit,
            "lambda": jnp.exp(multiplier_state.log_lambda),
            **_critic_metrics("critic", values, returns, rollout),
            **_critic_metrics("cost_critic", cost_values, cost_returns, rollout),
        }
        targets = {"critic": (values, returns), "cost_critic": (cost_values, cost_returns)}
        learners, update_metrics = _train(
            {"policy": state.policy, "critic": state.critic, "cost_critic": state.cost_critic},
            optimizers,
            _loss_functions(actor, {"critic": judge, "cost_critic": judge}, config),
            _experience(rollout, old, mixed, targets, ptx, config),
            key,
            config,
        )
        return LagrangianPPOState(**learners, multiplier=multiplier_state), metrics | update_metrics

    critics = ("critic", "cost_critic")
    logical_axes = lambda: {"policy": policy.logical_axes()} | dict.fromkeys(critics, critic.logical_axes())
    return Algorithm(init, step, logical_axes, policy)


def _logprobs(policy, params, reference, ref_params, rollout, config) -> tuple[jax.Array, jax.Array, Metrics]:
    """The trainer's own log-probs (so the first ratio is exactly 1), the reference's, and what they say together."""
    if rollout.truncated:
        raise ValueError(
            "this rollout was sampled with top-k or top-p, so its tokens do not follow the policy whose log-probs "
            "training needs: sample training rollouts at plain temperature"
        )
    logprobs, entropy = response_logprobs(policy, params, rollout, temperature=config.temperature)
    ref, _ = response_logprobs(reference, ref_params, rollout, temperature=config.temperature)
    logprobs, ref = jax.lax.stop_gradient((logprobs, ref))
    lengths = jnp.sum(rollout.mask, -1)
    per_sequence = lambda x: jnp.mean(masked.masked_sum(x, rollout.mask, -1))
    metrics = {
        "kl": per_sequence(losses.kl_k3(logprobs, ref, mask=rollout.mask)),
        "kl_k1": per_sequence(losses.kl_k1(logprobs, ref, mask=rollout.mask)),
        "entropy": masked.masked_mean(entropy, rollout.mask),
        "length": jnp.mean(lengths.astype(jnp.float32)),
        "unfinished": jnp.mean(~rollout.finished),
        "sampler_mismatch": jnp.max(masked.masked_fill(jnp.abs(logprobs - rollout.logprobs), rollout.mask)),
    }
    return logprobs, ref, metrics


def _check_signal(name: str, signal: jax.Array, rollout: Rollout) -> None:
    if signal.shape != rollout.finished.shape or not jnp.issubdtype(signal.dtype, jnp.floating):
        raise TypeError(f"{name} must be floats [B] = {rollout.finished.shape}, got {signal.dtype} {signal.shape}")


def _penalise_unfinished(scores: jax.Array, rollout: Rollout, config: PPOConfig) -> jax.Array:
    _check_signal("scores", scores, rollout)
    return jnp.where(rollout.finished, scores, scores - config.unfinished_penalty)


def _gae(rewards, values, rollout, config) -> tuple[jax.Array, jax.Array]:
    advantages = losses.gae(rewards, values, rollout.mask, gamma=config.gamma, gae_lambda=config.gae_lambda)
    return jax.lax.stop_gradient(advantages)


def _critic_metrics(name: str, values, returns, rollout) -> Metrics:
    unexplained = masked.masked_var(returns - values, rollout.mask) / masked.masked_var(returns, rollout.mask)
    return {f"{name}_value": masked.masked_mean(values, rollout.mask), f"{name}_explained_variance": 1 - unexplained}


def _experience(rollout, old_logprobs, advantages, targets, ptx, config) -> _Experience:
    if (ptx is None) != (config.ptx_coef == 0):
        given = "missing" if ptx is None else "given"
        raise ValueError(f"ptx_coef is {config.ptx_coef} but ptx is {given}: pass it exactly when ptx_coef > 0")
    if ptx is not None and len(ptx) != rollout.tokens.shape[0]:
        raise ValueError(f"ptx has {len(ptx)} demonstrations for {rollout.tokens.shape[0]} responses: pass as many")
    if config.whiten_advantages:
        advantages = masked.whiten(advantages, rollout.mask)
    return _Experience(rollout=rollout, old_logprobs=old_logprobs, advantages=advantages, targets=targets, ptx=ptx)


def _loss_functions(policy: Model, critics: dict[str, Model], config: PPOConfig) -> dict[str, Callable]:
    """Per learner: `(params, piece, num_tokens, num_ptx) -> (loss, metrics)`, where summing over pieces of a minibatch
    gives the minibatch's mean over tokens, because the counts are the whole minibatch's."""

    def policy_loss(params, piece: _Experience, num_tokens, num_ptx):
        rollout = piece.rollout
        over = lambda x: masked.masked_sum(x, rollout.mask) / num_tokens
        logprobs, _ = response_logprobs(policy, params, rollout, temperature=config.temperature)
        surrogate = losses.ppo_clip_loss(
            logprobs, piece.old_logprobs, piece.advantages, clip=config.clip, mask=rollout.mask
        )
        ratio = jnp.exp(masked.masked_fill(logprobs - piece.old_logprobs, rollout.mask))
        loss = over(surrogate)
        metrics = {
            "policy_loss": loss,
            "clip_fraction": over((jnp.abs(ratio - 1) > config.clip).astype(jnp.float32)),
            "old_kl": over(losses.kl_k3(logprobs, piece.old_logprobs, mask=rollout.mask)),
        }
        if piece.ptx is not None:
            nll, kept = next_token_nll(policy, params, piece.ptx, prompts=False)
            metrics["ptx_loss"] = masked.masked_sum(nll, kept) / num_ptx
            loss += config.ptx_coef * metrics["ptx_loss"]
        return loss, metrics

    def critic_loss(name: str, critic: Model):
        def loss_fn(params, piece: _Experience, num_tokens, num_ptx):
            values = response_values(critic, params, piece.rollout)
            kept = piece.rollout.mask
            squared = losses.clipped_value_loss(values, *piece.targets[name], clip=config.value_clip, mask=kept)
            loss = masked.masked_sum(squared, kept) / num_tokens
            return loss, {f"{name}_loss": loss}

        return loss_fn

    return {"policy": policy_loss, **{name: critic_loss(name, critic) for name, critic in critics.items()}}


def _train(learners, optimizers, loss_functions, experience: _Experience, key, config: PPOConfig):
    """`num_epochs` passes of `num_minibatches` optimiser steps for every learner; metrics are means over the steps.

    A step in which any loss or gradient is not finite changes nothing; "skipped" counts those.
    """
    num_rows = experience.rollout.tokens.shape[0]
    config.check_batch(num_rows)

    def minibatch_step(learners, rows):  # rows: [num_accumulation, rows per piece]
        minibatch = jax.tree.map(lambda x: _pieces(x[rows]), experience)
        num_tokens = jnp.sum(minibatch.rollout.mask)
        num_ptx = 1 if minibatch.ptx is None else jnp.sum(minibatch.ptx.mask)

        def gradients(piece):
            grads, metrics = {}, {}
            for name, learner in learners.items():
                loss_gradient = jax.grad(loss_functions[name], has_aux=True)
                grads[name], extra = loss_gradient(learner.params, piece, num_tokens, num_ptx)
                metrics |= extra
            return grads, metrics

        shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], minibatch))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        add = lambda total, piece: (jax.tree.map(jnp.add, total, gradients(piece)), None)
        (grads, metrics), _ = jax.lax.scan(add, zeros, minibatch)
        norms = {f"{name}_gradient_norm": optax.tree.norm(grads[name]) for name in learners}
        judged = [*norms.values(), *(metrics[f"{name}_loss"] for name in learners)]
        finite = jnp.all(jnp.isfinite(jnp.stack(judged)))
        update = lambda name: learners[name].apply_gradients(grads[name], optimizers[name], where=finite)
        return {name: update(name) for name in learners}, metrics | norms | {"skipped": ~finite}

    def epoch(learners, epoch_key):
        rows = jax.random.permutation(epoch_key, num_rows)
        return jax.lax.scan(
            minibatch_step, learners, rows.reshape(config.num_minibatches, config.num_accumulation, -1)
        )

    learners, metrics = jax.lax.scan(epoch, learners, jax.random.split(key, config.num_epochs))
    skipped = jnp.sum(metrics.pop("skipped"))
    return learners, jax.tree.map(jnp.mean, metrics) | {"skipped": skipped}


def _pieces(x: jax.Array) -> jax.Array:
    """`[num_accumulation, rows, ...]` with the rows of each piece split over the devices."""
    return constrain(x, None, "batch", *[None] * (x.ndim - 2), what="rows of a minibatch piece")
