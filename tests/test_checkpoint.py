"""What is restored is what was saved, on whatever devices, or an error says what is wrong and what to do."""

import concurrent.futures
import gc
import itertools
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax.io import checkpoint
from rlhfjax.io.checkpoint import Checkpoints
from rlhfjax.rl.multiplier import MultiplierConfig, make_multiplier
from rlhfjax.rl.ppo import LagrangianPPOState
from rlhfjax.types import TrainState

BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited:RuntimeWarning"
)


@pytest.fixture
def collect():
    """Orbax leaves the tasks of a failed restore behind: their complaints belong to the test that damaged the files."""
    yield
    gc.collect()


def learner(seed: int = 0) -> LagrangianPPOState:
    """A state as Lagrangian PPO keeps it, with the values and dtypes that are easily lost."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    special = [0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, 1e-40, 1 / 3, seed]
    params = {
        "noise": jax.random.normal(jax.random.key(seed), (32, 64)),
        "scale": {"float16": jnp.array(special, jnp.float16), "bfloat16": jnp.array(special, jnp.bfloat16)},
    }
    return LagrangianPPOState(
        policy=TrainState.create(params, optimizer),
        critic=TrainState.create({"head": jnp.array(special, jnp.float32)}, optimizer),
        cost_critic=TrainState(
            step=jnp.int32(-7),
            params={"kept": jnp.array([True, False]), "bytes": jnp.arange(256, dtype=jnp.uint8)},
            opt_state=(optax.EmptyState(), None),
        ),
        multiplier=make_multiplier(0.1, MultiplierConfig()).init(),
    )


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def bits(tree) -> list[tuple]:
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree)]
    return [(str(x.dtype), x.shape, x.tobytes()) for x in leaves]


def saved(path: pathlib.Path, *steps: int) -> pathlib.Path:
    with Checkpoints(path, identity="one") as checkpoints:
        for step in steps:
            checkpoints.save(step, learner(step), [step])
    return path


def restored(path: pathlib.Path, like=None):
    with Checkpoints(path, identity="one") as checkpoints:
        return checkpoints.restore(shapes(learner()) if like is None else like)


def python(code: str, *args, devices: int = 1, wait: bool = True):
    """A program in a process of its own; its output, or the process."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return finished(process) if wait else process


def finished(process) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, f"{out[-2000:]}\n{err[-6000:]}"
    return out


def test_a_saved_state_returns_bit_for_bit_in_its_structure(tmp_path):
    history = [{"step": 1, "loss": 0.1}, {"step": 2, "loss": float("inf")}]
    with Checkpoints(tmp_path / "new" / "directory", identity="one") as checkpoints:
        assert checkpoints.latest() is None and checkpoints.restore(shapes(learner())) is None
        checkpoints.save(3, learner(3), history)
        assert checkpoints.latest() == 3
    for like in (learner(), shapes(learner())):
        step, state, extra = restored(tmp_path / "new" / "directory", like)
        assert step == 3 and extra == history
        assert jax.tree.structure(state) == jax.tree.structure(learner(3)) and bits(state) == bits(learner(3))
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


def test_the_latest_steps_and_every_so_manieth_are_kept_and_each_can_be_restored(tmp_path):
    with Checkpoints(tmp_path, identity="one", keep=2, keep_every=4) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, {"x": jnp.full(3, step)})
        for step in (4, 6, 7):
            assert checkpoints.restore({"x": jnp.zeros(3, int)}, step)[1]["x"].tolist() == [step] * 3
        with pytest.raises(ValueError, match=re.escape("has no step 5, only [4, 6, 7]")):
            checkpoints.restore({"x": jnp.zeros(3, int)}, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "6", "7"]


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep_every": 0}])
def test_keeping_nothing_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match="at least 1"):
        Checkpoints(tmp_path, identity="one", **options)


def test_a_step_that_is_not_larger_is_not_dropped_silently(tmp_path):
    saved(tmp_path, 5)
    with Checkpoints(tmp_path, identity="one") as checkpoints:
        for step in (5, 4, -1):
            with pytest.raises(ValueError, match=f"step {step} cannot be saved in {tmp_path}, whose latest is 5"):
                checkpoints.save(step, learner())
    assert restored(tmp_path)[0] == 5


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    advance = jax.jit(lambda state: jax.tree.map(lambda x: -x - 1, state), donate_argnums=0)
    state = {"w": jax.random.normal(jax.random.key(0), (2_000_000,)), "step": jnp.int32(1)}  # takes a while to write
    want = bits(state)
    with Checkpoints(tmp_path, identity="one") as checkpoints:
        checkpoints.save(1, state)
        for _ in range(5):
            state = advance(state)
        jax.block_until_ready(state)
        assert bits(checkpoints.restore(state)[1]) == want != bits(state)


def test_a_history_is_saved_as_it_was_however_it_grows(tmp_path):
    state, history = {"x": jnp.ones(3)}, []
    with Checkpoints(tmp_path, identity="one", keep=8) as checkpoints:
        for step in range(8):
            checkpoints.save(step, state, history)
            history.append(step)
        for step in range(8):
            assert checkpoints.restore(state, step)[2] == list(range(step))


def test_learners_in_threads_side_by_side_do_not_mix(tmp_path):
    def learn(start: int) -> None:
        with Checkpoints(tmp_path / str(start), identity=str(start)) as checkpoints:
            for step in range(5):
                checkpoints.save(step, noise(start + step), start)
            step, state, extra = checkpoints.restore(noise(0))
        assert (step, extra, bits(state)) == (4, start, bits(noise(start + 4)))

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(learn, (0, 10, 20), timeout=60))


def test_a_directory_belongs_to_one_identity(tmp_path):
    saved(tmp_path, 1)
    with pytest.raises(ValueError, match=f"{tmp_path} holds checkpoints of one, not of another"):
        Checkpoints(tmp_path, identity="another")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: {**x, "w": x["w"].astype("float16")}, "state['w'] is float32[2, 3] there and float16[2, 3] here"),
        (lambda x: {**x, "w": x["w"].T}, "state['w'] is float32[2, 3] there and float32[3, 2] here"),
        (lambda x: {"w": x["w"]}, "state['step'] is int32[] there and missing here"),
        (lambda x: {**x, "more": x["w"]}, "state['more'] is missing there and float32[2, 3] here"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_model_names_the_leaf(tmp_path, change, message):
    state = {"w": jnp.ones((2, 3)), "step": jnp.int32(1)}
    with Checkpoints(tmp_path, identity="one") as checkpoints:
        checkpoints.save(1, state)
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/1 is a checkpoint of another model: {message}")):
            checkpoints.restore(change(state))


@pytest.mark.parametrize("leaf", [np.ones(3, np.float32), np.float32(1), 1.0])
def test_what_could_not_be_restored_is_not_saved(tmp_path, leaf):
    with Checkpoints(tmp_path, identity="one") as checkpoints:
        with pytest.raises(TypeError, match=re.escape(f"state['a'][1] ({type(leaf).__name__}) is no jax.Array")):
            checkpoints.save(1, {"a": [jnp.ones(3), leaf]})
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpoints.save(1, {}, {"loss": jnp.ones(())})
        assert checkpoints.latest() is None
        checkpoints.save(1, {"a": jnp.ones(3)})
        for like in (jax.ShapeDtypeStruct((3,), jnp.float32), leaf):
            with pytest.raises(TypeError, match=re.escape(f"state['a'] ({type(like).__name__}) does not say where")):
                checkpoints.restore({"a": like})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
def test_every_flipped_bit_and_every_swap_changes_both_sums(dtype):
    width = 1 if dtype == "bool" else 8 * jnp.dtype(dtype).itemsize
    word = BITS[jnp.dtype(dtype).itemsize]
    values = np.random.default_rng(0).integers(0, 2**width, (2, 3), word)
    values[0, 0], values[1, 2] = 0, 1
    flips = [values.flat[:] ^ (np.arange(6) == place).astype(word) * word(1 << bit)
             for place in range(6) for bit in range(width)]  # fmt: skip
    top = word(1 << (width - 1))  # a sum of products would not see two of these flipped
    pairs = [values.flat[:] ^ np.isin(np.arange(6), pair).astype(word) * top
             for pair in itertools.combinations(range(6), 2)]  # fmt: skip
    swaps = [values[::-1].ravel(), values[:, ::-1].ravel()]
    variants = np.stack([values.ravel(), *flips, *pairs, *swaps]).reshape(-1, 2, 3)
    assert len(np.unique(variants.reshape(-1, 6), axis=0)) == len(variants) or dtype == "bool"
    typed = jnp.asarray(variants.astype(bool) if dtype == "bool" else variants.view(jnp.dtype(dtype)))
    first, second = jax.vmap(checkpoint._sums)({"x": typed})["x"]
    changed = np.any(variants.reshape(-1, 6) != variants[0].ravel(), axis=1)
    assert np.array_equal(np.asarray(first != first[0]), changed)
    assert np.array_equal(np.asarray(second != second[0]), changed)


def test_a_flipped_byte_in_the_values_is_found_and_the_way_on_is_named(tmp_path):
    saved(tmp_path, 1, 2)
    file = max((tmp_path / "2").rglob("d/*"), key=lambda path: path.stat().st_size)
    flip(file, file.stat().st_size // 2)
    with pytest.raises(ValueError) as error:
        restored(tmp_path)
    assert re.search(r"state\.policy\.params\['noise'\].*does not hold the values that were saved", str(error.value))
    assert f"{tmp_path}/2 cannot" in str(error.value)
    assert str(error.value).endswith("delete it to resume from step 1 (kept: [1])")
    shutil.rmtree(tmp_path / "2")
    assert restored(tmp_path)[0] == 1 and bits(restored(tmp_path)[1]) == bits(learner(1))


def flip(file: pathlib.Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0x10
    file.write_bytes(content)


def test_a_flipped_byte_anywhere_is_an_error_or_harmless(tmp_path, collect):
    good = saved(tmp_path / "good", 1)
    want, damaged = bits(learner(1)), 0
    files = sorted(path for path in good.rglob("*") if path.is_file() and path.stat().st_size)
    for index, file in enumerate(files):
        for place in {0, file.stat().st_size // 3, file.stat().st_size - 1}:
            bad = tmp_path / f"bad-{index}-{place}"
            shutil.copytree(good, bad)
            flip(bad / file.relative_to(good), place)
            try:
                step, state, extra = restored(bad)
                assert (step, extra, bits(state)) == (1, [1], want), f"{file} at {place} changes what is restored"
            except ValueError as error:
                assert f"{bad}/1 cannot be restored" in str(error)
                assert str(error).endswith("delete it to start anew (no other is kept)")
                damaged += 1
    assert damaged > 10


@pytest.mark.parametrize("damage", ["truncated", "deleted", "garbage"])
def test_damaged_files_name_the_directory_and_the_way_on(tmp_path, damage, collect):
    saved(tmp_path, 1, 2)
    files = [path for path in (tmp_path / "2").rglob("*") if path.is_file() and path.stat().st_size]
    whole = {path: path.read_bytes() for path in files}
    if damage == "garbage":
        (tmp_path / "3" / "state").mkdir(parents=True)
        (tmp_path / "3" / "notes.txt").write_text("not a checkpoint")
        with pytest.raises(ValueError, match=f"{tmp_path}/3 cannot.*delete it to resume from step 2"):
            restored(tmp_path)
        return
    broken = 0
    for path, content in whole.items():
        path.unlink() if damage == "deleted" else path.write_bytes(content[: len(content) // 2])
        try:
            assert bits(restored(tmp_path)[1]) == bits(learner(2))
        except ValueError as error:
            assert re.search(f"{tmp_path}/2 cannot be restored.*delete it to resume from step 1", str(error), re.DOTALL)
            broken += 1
        path.write_bytes(content)
    assert broken >= 4
    assert restored(tmp_path)[0] == 2


NOISE = """
    import sys
    import jax
    from rlhfjax.io.checkpoint import Checkpoints

    def noise(step):
        return {"noise": jax.random.normal(jax.random.key(step), (200_000,)), "step": jax.numpy.int32(step)}
"""


def noise(step: int) -> dict:
    return {"noise": jax.random.normal(jax.random.key(step), (200_000,)), "step": jnp.int32(step)}


def test_a_full_disk_is_an_error_and_leaves_the_checkpoint_before_it(tmp_path):
    program = """
    import resource

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    states = [noise(step) for step in range(4)]
    checkpoints = Checkpoints(sys.argv[1], identity="one")
    checkpoints.save(1, states[1])
    assert checkpoints.latest() == 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))  # bytes in one file: the values do not fit
    for complain in (lambda: checkpoints.save(3, states[3]), checkpoints.close):
        checkpoints.save(2, states[2])
        try:
            complain()
        except RuntimeError as error:
            print(str(error).splitlines()[0])
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    with Checkpoints(sys.argv[1], identity="one") as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, states[2])
    """
    lines = python(NOISE + program, tmp_path).splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(f"step 2 could not be saved in {tmp_path}, which holds steps [1]: ")
    for step in (1, 2):
        with Checkpoints(tmp_path, identity="one") as checkpoints:
            assert bits(checkpoints.restore(noise(0), step)[1]) == bits(noise(step))


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    program = """
    checkpoints = Checkpoints(sys.argv[1], identity="one")
    step = 0 if checkpoints.latest() is None else checkpoints.latest() + 1
    while True:
        checkpoints.save(step, noise(step), step)
        print(step, flush=True)
        step += 1
    """
    for delay in (0, 0.02, 0.05):  # behind the return of a save, while its files are being written
        process = python(NOISE + program, tmp_path, wait=False)
        lines = [process.stdout.readline() for _ in range(3)]
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL and lines[-1]
        step, state, extra = restored(tmp_path, noise(0))
        assert step >= int(lines[-1]) - 1 and extra == step and bits(state) == bits(noise(step))
    with Checkpoints(tmp_path, identity="one") as checkpoints:
        checkpoints.save(step + 9, noise(step + 9))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([str(step), str(step + 9)])  # no half of any


SHARDED = """
    import sys
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from rlhfjax.io import checkpoint
    from rlhfjax.io.checkpoint import Checkpoints

    def create(num_devices):
        mesh = jax.make_mesh((num_devices // 2, 2), ("data", "fsdp"), devices=jax.devices()[:num_devices],
                             axis_types=(AxisType.Auto,) * 2)
        make = lambda: {"w": jnp.arange(64.0).reshape(8, 8) / 7, "half": jnp.arange(24).astype("bfloat16"),
                        "step": jnp.int32(3)}
        specs = {"w": P("fsdp", "data"), "half": P(("data", "fsdp")), "step": P()}
        return jax.jit(make, out_shardings={name: NamedSharding(mesh, spec) for name, spec in specs.items()})()

    def check_restore(checkpoints, num_devices):
        want = create(num_devices)
        step, found, extra = checkpoints.restore(jax.tree.map(jnp.zeros_like, want))
        for name in want:
            assert found[name].sharding == want[name].sharding, name
            for one, other in zip(found[name].addressable_shards, want[name].addressable_shards):
                assert np.array_equal(np.asarray(one.data), np.asarray(other.data)), name
        return step, extra
"""


def test_two_processes_save_what_eight_four_and_one_devices_restore(tmp_path):
    together = """
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[3]))
    with Checkpoints(sys.argv[1], identity="one") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, create(8), {"by": "two processes"})
        try:
            checkpoints.save(4, {"w": jnp.ones(3)})
        except TypeError as error:
            print(error)
        assert check_restore(checkpoints, 8) == (3, {"by": "two processes"})
    """
    alone = """
    with Checkpoints(sys.argv[1], identity="one") as checkpoints:
        for devices in (8, 4, 2):
            assert check_restore(checkpoints, devices) == (3, {"by": "two processes"})
        checkpoints.save(4, create(8), {"by": "eight devices"})
        program = checkpoint._sums.lower(create(8)).compile().as_text()
        assert "all-reduce" in program and "all-gather" not in program and "all-to-all" not in program
        for devices in (8, 4, 2):
            assert check_restore(checkpoints, devices) == (4, {"by": "eight devices"})
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [python(SHARDED + together, tmp_path, port, rank, devices=4, wait=False) for rank in range(2)]
    for process in both:
        assert "state['w'] (ArrayImpl) is no jax.Array that lies across all processes" in finished(process)
    python(SHARDED + alone, tmp_path, devices=8)
    like = {"w": jnp.zeros((8, 8)), "half": jnp.zeros(24, jnp.bfloat16), "step": jnp.int32(0)}
    for step in (3, 4):
        with Checkpoints(tmp_path, identity="one") as checkpoints:
            state = checkpoints.restore(like, step)[1]
        assert state["step"] == 3 and np.array_equal(state["half"], jnp.arange(24).astype(jnp.bfloat16))
        assert np.array_equal(state["w"], jnp.arange(64.0).reshape(8, 8) / 7)
