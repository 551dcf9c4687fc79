"""What every experiment file shares: its command line, its run directory, its seeds and its verdicts.

    python experiments/<paper>/<result>.py                one development seed, "not judged"
    python experiments/<paper>/<result>.py --seeds 5      report seeds 1000 .. 1004, one process per core, judged
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import tyro

from rlhfjax.evaluation.claims import Claim, judge, summary, table, write_claims
from rlhfjax.io.cache import StageCache
from rlhfjax.io.launch import Hosts, Preempted, broadcast, ending_together, initialize, is_main
from rlhfjax.io.monitor import Guard
from rlhfjax.io.run import Run, commit, config_hash
from rlhfjax.io.seeds import run_seeds, write_result
from rlhfjax.parallel.mesh import MeshConfig, make_mesh
from rlhfjax.worlds.gold_world import GoldWorld, gold_world

FIRST_REPORT_SEED = 1000  # seeds below 100 are for development; thresholds are fixed before a report seed runs
# Fields that do not decide what a seed computes (the mesh: up to rounding).
PLACES = ("runs", "name", "resume", "cache", "results", "workers", "mesh", "guard", "hosts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """How an experiment is started; an experiment's own config adds what it computes."""

    scale: Literal["smoke", "cpu", "gpu", "pod"] = "cpu"
    """Which of the file's configurations to start from; other options change single values of it."""
    truth: Literal["analytic", "teacher"] = "analytic"
    """The embedded world's truth: the one designs are developed on, or the second one that nobody tunes on."""
    seed: int = 0
    """Redraws labels, initialisations and RL."""
    seeds: int = 0
    """Run this many report seeds (1000, 1001, ...) and judge the claims; 0 runs `seed` alone."""
    runs: pathlib.Path = pathlib.Path("runs")
    """Where run directories go."""
    name: str | None = None
    """Name of the run directory; by default the file's name and a number."""
    resume: bool = False
    """Continue the run of that name: finished stages come from the cache, the one in progress from its checkpoint."""
    cache: pathlib.Path | None = pathlib.Path("runs/.cache")
    """Where finished stages and compiled programs are kept; `None` keeps nothing."""
    workers: int = 0
    """Seeds run at once by `--seeds`; 0: one per core. An accelerator is not shared: 1."""
    results: pathlib.Path | None = None
    """Where to leave this seed's statistics as a small JSON file (`--seeds` sets it beside the experiment)."""
    mesh: MeshConfig = MeshConfig()
    """How the devices share the work."""
    guard: Guard = Guard()
    """What is saved, and what stops a run."""
    hosts: Hosts = Hosts()
    """Where the other processes of one program are; on a TPU slice and under SLURM they are found."""

    def __post_init__(self):
        if self.seed < 0 or self.seeds < 0:
            raise ValueError(f"seed and seeds must not be negative, got {self.seed} and {self.seeds}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("num_") and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
            if field.name.endswith("_shares") and not (min(value) >= 0 and abs(sum(value) - 1) < 1e-6):
                raise ValueError(f"{field.name} must be non-negative and sum to 1, got {value}")
        if self.seeds and (self.name or self.resume):
            raise ValueError("--seeds gives every seed a run directory of its own: leave out --name and --resume")
        if self.seeds and self.hosts.coordinator:
            raise ValueError("--seeds runs one process per seed on this machine: leave out --hosts")
        if self.guard.nonfinite == "skip" and (self.seeds or self.results):
            raise ValueError("a result is reported only of a run that left no step out: --guard.nonfinite stop")

    def check(self) -> None:
        """Raise SystemExit for options that leave out what this scale needs; called before anything is written."""

    @property
    def world(self) -> GoldWorld:
        return gold_world(self.truth)

    @property
    def may_lack(self) -> bool:
        """Whether a claim may be left out where its statistic is not finite, which else is an error."""
        return False

    @property
    def label(self) -> str:
        """Names the truth that results were measured on, with the world's version."""
        return f"{self.world.name}-{self.world.version}-{self.truth}"


def stream(seed: int, name: str) -> int:
    """A seed for one use of randomness in an experiment: uses and neighbouring experiment seeds share nothing."""
    return int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0] >> 1)


Experiment = Callable[[Any, Run, StageCache], Mapping[str, float]]  # (config, run, cache) -> the seed's statistics


def main(file: str, scales: Mapping[str, ExperimentConfig], experiment: Experiment, claims: Sequence[Claim]) -> None:
    """The command line of the experiment in `file`.

    `scales` maps `--scale` to a config; `experiment(config, run, cache)` runs one seed and returns its statistics, of
    which each of `claims` names one.
    """
    path = pathlib.Path(file)
    config = _parse(scales, sys.argv[1:])
    config.check()
    digest = config_hash(config, exclude=("seed", "seeds", *PLACES), extra=(config.world.version, tuple(claims)))
    if config.seeds:
        _report(path, config, digest, claims)
        return
    initialize(config.hosts)
    voice = sys.stdout if is_main() else open(os.devnull, "w")
    with ending_together(), contextlib.redirect_stdout(voice), _mesh(config.mesh):
        mine = repr(dataclasses.replace(config, hosts=Hosts()))
        if (first := broadcast(mine)) != mine:
            raise ValueError(f"this process runs {mine}, process 0 runs {first}: start all with the same options")
        _one_seed(path, config, digest, experiment, claims)


def _mesh(config: MeshConfig):
    """The ambient mesh over all devices; one device needs none."""
    mesh = make_mesh(config)
    return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()


def _parse(scales: Mapping[str, ExperimentConfig], argv: Sequence[str]) -> ExperimentConfig:
    words = " ".join(argv).replace("=", " ").split()
    scale = words[words.index("--scale") + 1 : words.index("--scale") + 2] if "--scale" in words else ["cpu"]
    default = scales.get(scale[0] if scale else "", scales["cpu"])  # an unknown scale is tyro's to refuse
    config = tyro.cli(type(default), default=default, args=list(argv))
    if config.scale not in scales:
        sys.exit(f"this experiment has no configuration for --scale {config.scale}; it has {', '.join(scales)}")
    return config


def _one_seed(path: pathlib.Path, config, digest: str, experiment: Experiment, claims: Sequence[Claim]) -> None:
    start, source = time.time(), commit()  # files may change while this runs
    if config.cache is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(config.cache / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    stem = path.stem if config.results is None else f"{path.stem}-{config.truth}-seed{config.seed}"
    options = dict(name=config.name, resume=config.resume, exclude=PLACES, guard=config.guard)
    with Run(config.runs, config, stem=stem, **options) as run:
        cache = StageCache(config.cache and config.cache / "stages", run.path / "stages.json")
        print(f"{path.stem}, scale {config.scale}, {config.label}, seed {config.seed}: writing {run.path}", flush=True)
        try:
            statistics = experiment(config, run, cache)
        except Preempted as stop:
            print(f"{stop}; go on with the same options and --name {run.path.name} --resume", flush=True)
            sys.exit(0)
        finite = lambda x: x if math.isfinite(x) else None
        run.write_json("statistics.json", {name: finite(float(value)) for name, value in statistics.items()})
        seconds = round(time.time() - start, 1)
        if config.may_lack and (lacking := [c.id for c in claims if not math.isfinite(statistics[c.statistic])]):
            print(f"not measured on this data: {', '.join(lacking)}", flush=True)
            claims = [claim for claim in claims if claim.id not in lacking]
        rows = judge(
            claims, {config.seed: statistics}, world=config.label, config_hash=digest, commit=source, seconds=seconds
        )
        write_claims(run.path / "claims.json", rows)
        if config.results is not None:
            write_result(config.results, world=config.label, seed=config.seed, config_hash=digest, commit=source,
                         seconds=seconds, statistics=statistics)  # fmt: skip
    shown = f"{table(rows)}\n\nOne seed is not judged: --seeds 5 runs report seeds." if rows else "\n".join(
        f"{name:>28}  {value:.4g}" for name, value in statistics.items())  # fmt: skip
    print(f"\n{shown} {seconds:.0f} s, all in {run.path}")


def _report(path: pathlib.Path, config, digest: str, claims: Sequence[Claim]) -> None:
    results_dir = config.results or path.parent / "results" / path.stem
    argv = _without(sys.argv[1:], "--seeds", "--seed", "--results", "--workers")
    results = run_seeds(
        [str(path), *argv, "--results", str(results_dir)],
        range(FIRST_REPORT_SEED, FIRST_REPORT_SEED + config.seeds),
        results_dir,
        world=config.label,
        config_hash=digest,
        log_dir=config.runs / "logs" / path.stem,
        workers=config.workers or None,
    )
    commits = ", ".join(sorted({str(result["commit"]) for result in results.values()}))
    statistics = {seed: result["statistics"] for seed, result in results.items()}
    rows = judge(
        claims,
        statistics,
        world=config.label,
        config_hash=digest,
        commit=commits,
        seconds=sum(result["seconds"] for result in results.values()),
    )
    write_claims(results_dir / f"{config.label}-claims.json", rows)
    if len(results) > 1:
        print(f"\n{summary(statistics)}")
    print(f"\n{table(rows)}\n\n{len(results)} seeds of {config.label}, by commit {commits}; claims in {results_dir}")


def _without(argv: Sequence[str], *options: str) -> list[str]:
    """`argv` without these options and their values, written `--option value` or `--option=value`."""
    kept, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word in options:
            skip = True
        elif not any(word.startswith(f"{option}=") for option in options):
            kept.append(word)
    return kept
