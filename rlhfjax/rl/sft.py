"""Next-token training: the base language model, supervised fine-tuning, and PPO's pretraining mix (ptx)."""

import jax
import jax.numpy as jnp

from rlhfjax import masked
from rlhfjax.models.transformer import Model
from rlhfjax.types import Demonstrations, Params, before_response_tokens, join


def next_token_nll(
    model: Model, params: Params, batch: Demonstrations, *, prompts: bool
) -> tuple[jax.Array, jax.Array]:
    """`-log p(token | before)` in nats and the mask of the tokens it is defined for, both `[B, S]`.

    `prompts=False` keeps the response tokens only (`S = T`, supervised fine-tuning); `prompts=True` keeps every token
    that has a kept token before it (`S = P + T - 1`, language modelling).
    """
    tokens, mask = join(batch.prompts, batch.prompt_mask, batch.tokens, batch.mask)
    num_targets = tokens.shape[-1] - 1 if prompts else batch.tokens.shape[-1]
    logits, _ = model.apply(params, tokens, mask, num_outputs=num_targets + 1)
    logprobs = jax.nn.log_softmax(before_response_tokens(logits, num_targets))
    targets = tokens[:, -num_targets:]
    kept = mask[:, -num_targets:] & before_response_tokens(mask, num_targets)
    return -jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0], kept


def make_next_token_loss(model: Model, *, prompts: bool = False):
    """`loss_fn(params, batch: Demonstrations)`: mean NLL per kept token, for `make_fit_step`."""

    def loss_fn(params: Params, batch: Demonstrations):
        return masked.masked_mean(*next_token_nll(model, params, batch, prompts=prompts)), {}

    return loss_fn
