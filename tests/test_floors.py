"""An import points down, never up; and only the models know Flax."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# From the ground up; a package stands on exactly one floor.
FLOORS = [
    {"rlhfjax.types", "rlhfjax.masked"},
    {"rlhfjax.losses"},
    {"rlhfjax.models", "rlhfjax.parallel"},
    {"rlhfjax.rl"},
    {"rlhfjax.evaluation", "rlhfjax.feedback", "rlhfjax.worlds", "rlhfjax.data", "rlhfjax.io"},
    {"rlhfjax.stages"},
    {"rlhfjax.experiment"},
    {"rlhfjax.audit", "rlhfjax.pipeline", "rlhfjax.results"},
    {"experiments"},
]
GROUND = {"jax", "chex", "numpy", *sys.stdlib_module_names}  # all that the lowest two floors may need
HEAVY = {"flax", "optax", "transformers", "tensorflow", "tensorflow_datasets", "torch"}


def floor(module: str) -> int:
    for height, names in enumerate(FLOORS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return height
    raise LookupError(f"{module} stands on no floor: add it to FLOORS")


def imported_modules(source: str, package: str) -> set[str]:
    """Every module a source imports, wherever the statement stands; `from rlhfjax import x` counts as `rlhfjax.x`."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, [*above, node.module]))
            modules |= {f"{base}.{alias.name}" for alias in node.names} if base == "rlhfjax" else {base}
    return modules


def violations(source: str, module: str) -> list[str]:
    height, found = floor(module), []
    for name in imported_modules(source, module.rpartition(".")[0]):
        top = name.partition(".")[0]
        if top in ("rlhfjax", "experiments"):
            if name not in ("rlhfjax", "rlhfjax.__version__") and floor(name) > height:
                found.append(f"{module} imports {name}, which stands above it")
        elif height <= 1 and top not in GROUND:
            found.append(f"{module} imports {name}: the lowest floors need jax, chex and numpy only")
        elif top == "flax" and not module.startswith("rlhfjax.models"):
            found.append(f"{module} imports {name}: only rlhfjax.models knows Flax")
    return found


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = sorted(p for top in ("rlhfjax", "experiments") for p in (ROOT / top).rglob("*.py"))


def test_imports_point_down():
    assert len(FILES) > 10
    found = [v for path in FILES if module_of(path) != "rlhfjax" for v in violations(path.read_text(), module_of(path))]
    assert not found, "\n".join(found)


def test_the_package_itself_imports_nothing():
    assert not imported_modules((ROOT / "rlhfjax/__init__.py").read_text(), "rlhfjax")


@pytest.mark.parametrize(
    "source, module",
    [
        ("from rlhfjax.rl import ppo", "rlhfjax.losses.policy"),
        ("from rlhfjax import models", "rlhfjax.types"),
        ("import rlhfjax.stages", "rlhfjax.worlds.gold"),
        ("from ..rl import ppo", "rlhfjax.losses.policy"),
        ("def late():\n    import experiments.safe_rlhf.constrained_ppo", "rlhfjax.stages"),
        ("import optax", "rlhfjax.losses.lagrange"),
        ("from flax import nnx", "rlhfjax.rl.ppo"),
    ],
)
def test_planted_fault_import_that_points_up(source, module):
    assert violations(source, module)


@pytest.mark.parametrize(
    "source, module",
    [
        ("from rlhfjax import losses, masked\nimport optax", "rlhfjax.rl.ppo"),
        ("from flax import nnx", "rlhfjax.models.transformer"),
        ("from .preference import cost_loss\nimport math", "rlhfjax.losses.lagrange"),
        ("from rlhfjax.stages import fit", "experiments.safe_rlhf.constrained_ppo"),
    ],
)
def test_imports_that_point_down_are_fine(source, module):
    assert not violations(source, module)


def test_losses_load_nothing_heavy():
    code = f"import sys, rlhfjax.losses; print(*sorted({HEAVY} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
