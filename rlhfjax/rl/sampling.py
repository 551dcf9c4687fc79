"""Sampling responses, and the trainer's recomputation of their log-probabilities.

Training rollouts use plain temperature, so that the sampler's log-probabilities are the policy's own: both sides divide
the logits by the same temperature before the log-softmax. Top-k and top-p are for evaluation only and mark their
rollout `truncated`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhfjax import losses
from rlhfjax.masked import masked_fill
from rlhfjax.models.transformer import Model
from rlhfjax.parallel.mesh import constrain_rows
from rlhfjax.types import Params, Rollout, before_response_tokens, check_finite, check_mask, sequences

Sample = Callable[[Params, jax.Array, jax.Array, jax.Array], Rollout]


def make_sampler(
    model: Model,
    *,
    max_tokens: int,
    eos_id: int,
    pad_id: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Sample:
    """`sample(params, prompts, prompt_mask, key) -> Rollout`: prefill and decode in one jit, with a static cache.

    Token t is drawn from `softmax(logits / temperature)`. A row ends with its EOS, which counts (mask True); behind it
    stand `pad_id`, mask False and log-probability 0. Decoding stops when every row has ended, at `max_tokens` at the
    latest. One key gives one rollout: equal keys, equal responses.

    Args:
        prompts, prompt_mask: `[B, P]` int and bool, left padded.
        top_k: keep the k most probable tokens (and ties with the last of them).
        top_p: keep the fewest most probable tokens that hold at least this probability, after top-k.
    Returns:
        Rollout with T = max_tokens; its logprobs are those of the *uncut* tempered distribution.
    Raises:
        ValueError: an option out of range; prompts with an empty row or padded on the right (seen in host arrays only).
    """
    vocab_size = model.config.vocab_size
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    for name, token in (("eos_id", eos_id), ("pad_id", pad_id)):
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name}={token} is not in the vocabulary of {vocab_size}")
    if eos_id == pad_id:
        raise ValueError(f"eos_id and pad_id are both {eos_id}: a masked token cannot teach a policy to stop")
    _check_temperature(temperature)
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k={top_k} must lie in 1..{vocab_size}, the size of the vocabulary")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]")

    def draw(logits, alive, key, step):
        """One token per row from `logits [B, V]`, its log-probability, and whether the row goes on."""
        logits = logits / temperature
        noisy = _cut(logits, top_k, top_p) + jax.random.gumbel(jax.random.fold_in(key, step), logits.shape)
        # What jax.random.categorical draws; its argmax would cost a small model a fifth of its decoding on a CPU.
        token = jnp.min(jnp.where(noisy == noisy.max(1, keepdims=True), jnp.arange(vocab_size), vocab_size - 1), axis=1)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
        token = jnp.where(alive, token, pad_id).astype(jnp.int32)
        return token, jnp.where(alive, logprob, 0.0), alive & (token != eos_id)

    @jax.jit
    def generate(params: Params, prompts: jax.Array, prompt_mask: jax.Array, key: jax.Array) -> Rollout:
        rows, prompt_length = prompts.shape
        prompts, prompt_mask = constrain_rows((prompts, prompt_mask))
        # The last token drawn is never read again, hence one slot less.
        cache = model.init_cache(rows, prompt_length + max_tokens - 1)
        logits, cache = model.apply(params, prompts, prompt_mask, cache=cache, num_outputs=1)
        everyone = jnp.ones(rows, bool)
        token, logprob, alive = draw(logits[:, 0], everyone, key, 0)
        tokens = jnp.full((rows, max_tokens), pad_id, jnp.int32).at[:, 0].set(token)
        logprobs = jnp.zeros((rows, max_tokens)).at[:, 0].set(logprob)
        mask = jnp.zeros((rows, max_tokens), bool).at[:, 0].set(True)

        def goes_on(carry):
            step, alive, *_ = carry
            return (step < max_tokens) & jnp.any(alive)

        def decode(carry):
            step, alive, token, cache, tokens, logprobs, mask = carry
            mask = mask.at[:, step].set(alive)
            logits, cache = model.apply(params, token[:, None], alive[:, None], cache=cache)
            token, logprob, alive = draw(logits[:, 0], alive, key, step)
            tokens, logprobs = tokens.at[:, step].set(token), logprobs.at[:, step].set(logprob)
            return step + 1, alive, token, cache, tokens, logprobs, mask

        carry = (jnp.ones((), jnp.int32), alive, token, cache, tokens, logprobs, mask)
        _, alive, _, _, tokens, logprobs, mask = jax.lax.while_loop(goes_on, decode, carry)
        return Rollout(
            prompts=prompts.astype(jnp.int32),
            prompt_mask=prompt_mask,
            tokens=tokens,
            mask=mask,
            logprobs=logprobs,
            finished=~alive,
            truncated=top_k is not None or top_p not in (None, 1),
        )

    def sample(params: Params, prompts: jax.Array, prompt_mask: jax.Array, key: jax.Array) -> Rollout:
        if not isinstance(prompt_mask, jax.Array):  # on a device they lie as the caller has checked them
            check_mask("prompt_mask", prompt_mask, padded="left")
        return generate(params, prompts, prompt_mask, key)

    return sample


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be positive and finite; for greedy sampling use top_k=1")


def _cut(logits: jax.Array, top_k: int | None, top_p: float | None) -> jax.Array:
    """`logits [B, V]` with -inf wherever top-k, then top-p, cuts."""
    if top_k is not None:
        smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p is not None and top_p < 1:
        ranked = -jnp.sort(-logits, axis=-1)
        probs = jax.nn.softmax(ranked)
        smallest = jnp.min(jnp.where(jnp.cumsum(probs, -1) - probs < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


def response_logprobs(
    model: Model, params: Params, rollout: Rollout, *, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies of a rollout's tokens under `params`: the trainer's side of the sampler.

    logprobs[b, t] = log softmax(logits / temperature)[tokens[b, t]]; entropy[b, t] is that distribution's, in nats.
    Both `[B, T]` float32, 0 where masked out, differentiable in `params`. The temperature must be the sampler's.
    """
    _check_temperature(temperature)
    num_tokens = rollout.tokens.shape[1]
    outputs, _ = model.apply(params, *sequences(rollout), num_outputs=num_tokens + 1)
    logits = before_response_tokens(outputs, num_tokens) / temperature
    chosen = jnp.where(rollout.mask, rollout.tokens, 0)[..., None]
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=-1)[..., 0]
    return masked_fill(logprobs, rollout.mask), losses.entropy(logits, mask=rollout.mask)


def make_best_of_n(sample: Sample, score: Callable[[Rollout], jax.Array], n: int):
    """`best(params, prompts, prompt_mask, key) -> (Rollout, scores [B])`: the best of n responses to each prompt.

    `score(rollout) -> [B]` says what is best; the first of equals is taken. Raises FloatingPointError for scores that
    are not finite (outside a jit only).
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")

    def best(params: Params, prompts: jax.Array, prompt_mask: jax.Array, key: jax.Array) -> tuple[Rollout, jax.Array]:
        repeated = (jnp.repeat(x, n, axis=0) for x in (prompts, prompt_mask))
        rollout = sample(params, *repeated, key)
        scores = score(rollout)
        if scores.shape != rollout.finished.shape:
            raise ValueError(f"scores must have shape [B] = {rollout.finished.shape}, got {scores.shape}")
        if not isinstance(scores, jax.core.Tracer):
            check_finite("scores", scores)
        winner = jnp.arange(len(prompts)) * n + jnp.argmax(scores.reshape(-1, n), axis=1)
        return jax.tree.map(lambda x: x[winner], (rollout, scores))

    return best
