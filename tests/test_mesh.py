"""One mesh, one table: the same iterations on one device and on eight, and what does not fit is refused.

`JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python tests/test_mesh.py` prints the parity table.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax import stages
from rlhfjax.io.monitor import Monitor
from rlhfjax.models.transformer import TransformerConfig, make_language_model, make_scalar_model
from rlhfjax.parallel import memory, mesh
from rlhfjax.parallel.mesh import MeshConfig, make_mesh
from rlhfjax.rl.multiplier import MultiplierConfig, make_multiplier
from rlhfjax.rl.ppo import PPOConfig, make_lagrangian_ppo
from rlhfjax.rl.preference_models import ScoreModel, make_cost, make_reward
from rlhfjax.rl.sampling import make_sampler
from rlhfjax.types import Demonstrations, TrainState

NETWORK = TransformerConfig(vocab_size=64, d_model=32, num_layers=2, num_heads=8, d_ff=64)
MESHES = [dict(data=8), dict(fsdp=8), dict(tensor=8), dict(data=4, fsdp=2), dict(data=2, fsdp=2, tensor=2),
          dict(fsdp=2, tensor=4)]  # fmt: skip
ITERATIONS, ROWS = 2, 32


def on(config: MeshConfig | None):
    return jax.set_mesh(make_mesh(config)) if config else contextlib.nullcontext()


@functools.cache
def iterations(config: MeshConfig | None, scan: bool = False):
    """Two whole iterations of Safe RLHF: the state, everything logged, and every response, as host arrays."""
    network = dataclasses.replace(NETWORK, scan_layers=scan)
    policy, scalar = make_language_model(network), make_scalar_model(network, head_std=0.1)
    ppo = PPOConfig(num_minibatches=2, num_accumulation=2, ptx_coef=0.1)
    # Where a gradient is noise alone, Adam's first step is the sign of that noise: a larger eps lets rounding be small.
    optimizer = lambda: optax.adamw(1e-2, eps=1e-3)
    algorithm = make_lagrangian_ppo(policy, scalar, optimizer(), optimizer(), ppo,
                                    make_multiplier(0.4, MultiplierConfig()))  # fmt: skip
    rng, log, seen = np.random.default_rng(0), [], []
    tokens = rng.integers(3, 61, (64, 6), dtype=np.int32)
    mask = np.arange(6) >= rng.integers(0, 5, (64, 1))
    with on(config):
        place = lambda model, params: mesh.place(params, model.logical_axes())
        params = place(policy, jax.tree.map(np.asarray, policy.init(jax.random.key(0))))
        judges = [place(scalar, ScoreModel(params=jax.tree.map(np.asarray, scalar.init(jax.random.key(k))),
                                           shift=np.float32(0), scale=np.float32(1))) for k in (1, 2)]  # fmt: skip
        score = lambda fn: jax.jit(lambda params, rollout: mesh.constrain(fn(params, rollout), None))
        scorers = [score(make(scalar)) for make in (make_reward, make_cost)]
        state = stages.run_rl(
            algorithm=algorithm, params=(params, *(judge.params for judge in judges)), ref_params=params,
            sample=make_sampler(policy, max_tokens=7, eos_id=1, pad_id=0, temperature=0.9),
            feedback=lambda rollout, key: tuple(f(judge, rollout) for f, judge in zip(scorers, judges)),
            observe=lambda rollout: seen.append(mesh.fetch(rollout)) or {},
            prompts=tokens, prompt_mask=mask, num_iterations=ITERATIONS, batch_size=ROWS, seed=3, label="parity",
            ptx=Demonstrations(prompts=tokens, prompt_mask=mask, tokens=tokens, mask=np.ones_like(mask)),
            monitor=Monitor(log=lambda step, metrics: log.append(dict(metrics))))  # fmt: skip
        measured = {name: shard_bytes(tree) for name, tree in vars(state).items()}
        return mesh.fetch(state), log, seen, measured


def shard_bytes(tree) -> int:
    """What lies on the first device, counted from the arrays themselves."""
    return sum(shard.data.nbytes for x in jax.tree.leaves(tree) for shard in x.addressable_shards
               if shard.device == jax.devices()[0])  # fmt: skip


def largest_difference(one, other) -> float:
    return max(float(np.max(np.abs(np.float64(a) - np.float64(b)), initial=0))
               for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))  # fmt: skip


def parity(config: MeshConfig, scan: bool) -> dict[str, float]:
    (one, _, said_one, _), (many, _, said_many, _) = iterations(None, scan), iterations(config, scan)
    learners = ("policy", "critic", "cost_critic")
    collect = lambda state, part: [part(getattr(state, name)) for name in learners]
    return {
        "responses": largest_difference([r.tokens for r in said_one], [r.tokens for r in said_many]),
        "parameters": largest_difference(collect(one, lambda s: s.params), collect(many, lambda s: s.params)),
        "moments": largest_difference(collect(one, lambda s: s.opt_state), collect(many, lambda s: s.opt_state)),
        "multiplier": largest_difference(one.multiplier, many.multiplier),
    }


# The same iteration everywhere


@pytest.mark.parametrize("shape, scan", [
    (dict(fsdp=8), False),
    (dict(data=2, tensor=4), False),
    (dict(data=4, fsdp=2), True),
    (dict(data=2, fsdp=2, tensor=2), True),
], ids=str)  # fmt: skip
def test_whole_iterations_agree_with_one_device_to_rounding(shape, scan):
    assert parity(MeshConfig(**shape), scan) == {
        "responses": 0,
        "parameters": pytest.approx(0, abs=1e-5),
        "moments": pytest.approx(0, abs=1e-6),
        "multiplier": pytest.approx(0, abs=1e-6),
    }
    for one, many in zip(iterations(None, scan)[1], iterations(MeshConfig(**shape), scan)[1]):
        for name in (name for name in one if not name.startswith("time/")):
            assert many[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


def test_parameters_and_moments_on_a_device_fall_as_one_over_fsdp():
    whole, split = iterations(None)[3], iterations(MeshConfig(fsdp=8))[3]
    for learner in ("policy", "critic", "cost_critic"):
        counters = 8  # the step of the state and of Adam: int32 scalars
        assert split[learner] - counters == (whole[learner] - counters) / 8
    assert split["multiplier"] == whole["multiplier"] == 12


def test_the_cache_and_the_rows_of_a_rollout_are_split_and_decoding_gathers_nothing_over_fsdp():
    model = make_language_model(NETWORK)
    with on(MeshConfig(data=2, fsdp=2, tensor=2)):
        keys, values = jax.jit(lambda: model.init_cache(8, 10))().layers[0]
        assert {shard.data.shape for shard in keys.addressable_shards} == {(2, 4, 10, 4)}  # of [8, 8, 10, 4]
        decoding = mesh.place(fetched(model), model.logical_axes(), mesh.DECODE_RULES)
        assert {"fsdp"} & {axis for x in jax.tree.leaves(decoding) for axis in x.sharding.spec} == set()
        rows = mesh.place_rows(np.arange(16).reshape(8, 2))
        assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 2)}
        np.testing.assert_array_equal(mesh.fetch(rows), np.arange(16).reshape(8, 2))


@functools.cache
def fetched(model):
    return jax.tree.map(np.asarray, model.init(jax.random.key(0)))


def test_every_leaf_of_an_optimiser_follows_its_parameter():
    model = make_scalar_model(NETWORK)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.MultiSteps(optax.adamw(1e-3), 2), optax.ema(0.9))
    with on(MeshConfig(fsdp=4, tensor=2)):
        state = jax.eval_shape(lambda: TrainState.create(model.init(jax.random.key(0)), optimizer))
        found = mesh.shardings(state, model.logical_axes())
        wanted = jax.tree.map(lambda sharding: sharding.spec, found.params)
        copies = [found.opt_state[1].acc_grads, found.opt_state[2].ema, found.opt_state[1].inner_opt_state[0].nu]
        assert all(jax.tree.map(lambda sharding: sharding.spec, copy) == wanted for copy in copies)
        assert tuple(wanted["blocks"]["mlp"]["up"]) == (None, "fsdp", "tensor")
        assert tuple(found.opt_state[1].mini_step.spec) == ()


def test_without_a_mesh_nothing_is_laid_out():
    assert mesh.shardings({"w": jnp.ones(3)}, {}) is None and mesh.replicated() is None
    assert mesh.padded(5) == 5
    assert mesh.place_rows(np.ones(3)).sharding.num_devices == 1


def test_a_step_hides_no_transfer_between_host_and_device():
    step = lambda state, batch: ({"w": state["w"] + jnp.mean(batch)}, {"w": state["w"]})
    with on(MeshConfig(fsdp=2)):
        axes = {"w": ("embed",)}
        state = mesh.create(lambda: {"w": jnp.zeros(4)}, axes=axes)
        update = mesh.jit_step(step, state, axes)
        with jax.transfer_guard("disallow"):
            for _ in range(2):
                state, metrics = update(state, mesh.place_rows(np.ones((8, 1), np.float32)))
            jax.device_get(metrics)
            with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
                update(state, np.ones((8, 1), np.float32))


# What does not fit


def test_what_does_not_fit_in_memory_is_refused_with_its_numbers_before_it_is_made(monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda: 2**20)
    with pytest.raises(
        MemoryError, match=r"needs 4096.\d+ GiB on each device \(parameters 4096.00, .*which has 0.00: spl"
    ):
        mesh.create(lambda: {"w": jnp.zeros((2**20, 2**20))}, axes={})
    step = mesh.jit_step(lambda state, x: (state, jnp.sum(jnp.sort(jnp.outer(x, x)))), jnp.zeros(2), None, "the update")
    with pytest.raises(MemoryError, match=r"the update needs .* temporaries 0\.\d+, already there"):
        step(jnp.zeros(2), jnp.ones(2000))


def test_memory_is_that_of_one_device():
    assert 2**28 < memory.device_memory() < 2**50
    with on(MeshConfig(fsdp=8)):
        x = mesh.place({"w": np.zeros((16, 4), np.float32)}, {"w": ("embed", None)})
        assert memory.bytes_per_device(x) == 32 == shard_bytes(x)


if __name__ == "__main__":
    print("| mesh | responses | parameters | moments | multiplier | bytes of the policy's state per device |")
    print("|---|---|---|---|---|---|")
    for shape in (dict(data=8), dict(fsdp=8), dict(tensor=8), dict(data=4, fsdp=2), dict(data=2, fsdp=2, tensor=2)):
        cells = [f"{value:.0e}" for value in parity(MeshConfig(**shape), False).values()]
        cells = [*cells, f"{iterations(MeshConfig(**shape))[3]['policy']:,}"]
        print(f"| {', '.join(f'{name} {size}' for name, size in shape.items())} | {' | '.join(cells)} |", flush=True)
