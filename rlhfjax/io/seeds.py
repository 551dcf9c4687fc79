"""One process per seed, one small JSON file per finished seed: a report that can be stopped and continued."""

import collections
import dataclasses
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhfjax.io.run import read_json, write_json

POLL_SECONDS, REPORT_SECONDS = 0.1, 15.0


def result_path(results_dir: str | os.PathLike, world: str, seed: int) -> pathlib.Path:
    return pathlib.Path(results_dir) / f"{world}-seed{seed}.json"


def write_result(
    results_dir: str | os.PathLike,
    *,
    world: str,
    seed: int,
    config_hash: str,
    commit: str | None,
    seconds: float,
    statistics: Mapping[str, float],
) -> pathlib.Path:
    """What one seed leaves behind for `judge`. config_hash is that of the config *without* its seed."""
    path = result_path(results_dir, world, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {
        "world": world, "seed": seed, "config_hash": config_hash, "commit": commit, "seconds": round(seconds, 1),
        "statistics": {name: float(value) for name, value in statistics.items()},
    })  # fmt: skip
    return path


def read_results(
    results_dir: str | os.PathLike, world: str, seeds: Sequence[int], config_hash: str
) -> dict[int, dict[str, Any]]:
    """Stored results of those `seeds` that have one of this very config."""
    paths = {seed: result_path(results_dir, world, seed) for seed in seeds}
    found = {seed: read_json(path) for seed, path in paths.items() if path.exists()}
    for seed, result in found.items():
        if not isinstance(result, dict) or (result.get("world"), result.get("seed")) != (world, seed):
            raise ValueError(f"{paths[seed]} is no result of seed {seed} on {world}: delete it to run that seed again")
    return {seed: result for seed, result in found.items() if result.get("config_hash") == config_hash}


@dataclasses.dataclass(frozen=True)
class _Child:
    seed: int
    process: subprocess.Popen
    cores: tuple[int, ...]
    log: pathlib.Path
    start: float


def run_seeds(
    command: Sequence[str],
    seeds: Sequence[int],
    results_dir: str | os.PathLike,
    *,
    world: str,
    config_hash: str,
    log_dir: str | os.PathLike,
    workers: int | None = None,
    report: Callable[[str], None] = print,
) -> dict[int, dict[str, Any]]:
    """Run `python *command --seed k` for every seed without a stored result, and return the results of all.

    Each process is bound to its own share of the cores, writes its result with `write_result`, and prints into
    `log_dir/<world>-seed<k>.log`. A failed seed is reported and the others go on. An interrupt (Ctrl-C) stops the
    processes; what has finished stays, and the next call runs only what is missing.

    Args:
        command: the experiment file and its options, without `--seed`.
        workers: processes at once; by default one per core. An accelerator is not shared: pass 1.
        report: told how far things are, and about how long they will take.
    Raises:
        ValueError: no seed, or one given twice. RuntimeError: at the end, if any seed failed.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be given once each, got {list(seeds)}")
    done = read_results(results_dir, world, seeds, config_hash)
    waiting = collections.deque(seed for seed in seeds if seed not in done)
    if done:
        report(f"{len(done)} of {len(seeds)} seeds have results already: {', '.join(map(str, done))}")
    free, running, failed = _shares(workers, len(waiting)), [], {}
    start = last_report = time.monotonic()
    try:
        while waiting or running:
            while waiting and free:
                running.append(_start(command, waiting.popleft(), free.pop(), pathlib.Path(log_dir), world))
                report(f"seed {running[-1].seed} started, its output is in {running[-1].log}")
            time.sleep(POLL_SECONDS)
            for child in [child for child in running if child.process.poll() is not None]:
                running.remove(child)
                free.append(child.cores)
                result = read_results(results_dir, world, [child.seed], config_hash)
                if child.process.returncode == 0 and result:
                    done |= result
                    report(f"seed {child.seed} finished in {_clock(time.monotonic() - child.start)}")
                else:
                    code = child.process.returncode
                    failed[child.seed] = f"exit status {code}" if code else "it left no result of this config"
                    report(f"seed {child.seed} failed: {failed[child.seed]}; {child.log} ends:\n{_tail(child.log, 8)}")
            if running and time.monotonic() - last_report > REPORT_SECONDS:
                last_report = time.monotonic()
                report(_progress(done, failed, running, waiting, len(seeds), last_report - start))
    finally:
        for child in running:
            child.process.terminate()
        for child in running:
            try:
                child.process.wait(5)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(seeds)} seeds failed, run again to repeat only these: {failed}")
    return {seed: done[seed] for seed in seeds}


def _shares(workers: int | None, num_jobs: int) -> list[tuple[int, ...]]:
    """The cores of each worker. Platforms that cannot bind a process get one empty share per worker."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    workers = max(1, min(workers or len(cores) or os.cpu_count() or 1, num_jobs))
    if workers > len(cores):  # more workers than cores, as asked: nobody is bound
        return [()] * workers
    return [tuple(cores[worker::workers]) for worker in range(workers)]


def _start(command: Sequence[str], seed: int, cores: tuple[int, ...], log_dir: pathlib.Path, world: str) -> _Child:
    log_dir.mkdir(parents=True, exist_ok=True)
    log = log_dir / f"{world}-seed{seed}.log"
    with open(log, "w") as stream:
        process = subprocess.Popen(
            [sys.executable, *command, "--seed", str(seed)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
    if cores:
        os.sched_setaffinity(process.pid, cores)  # before the child has threads, so all of them inherit it
    return _Child(seed, process, cores, log, time.monotonic())


def _progress(done: Mapping, failed: Mapping, running: Sequence[_Child], waiting, total: int, elapsed: float) -> str:
    """One line: counts, time left by the mean time of finished seeds, and the last words of each running one."""
    left = "the first seed will tell how long it takes"
    if done:
        each = sum(result["seconds"] for result in done.values()) / len(done)
        ages = [time.monotonic() - child.start for child in running]
        work = each * len(waiting) + sum(max(0.0, each - age) for age in ages)
        left = f"about {_clock(work / len(running))} left"
    words = "".join(f"\n    {child.seed}: {_tail(child.log, 1)}" for child in running)
    counts = f"{len(done)} of {total} seeds done, {len(failed)} failed, {len(running)} running, {len(waiting)} waiting"
    return f"{counts}; {_clock(elapsed)} elapsed, {left}{words}"


def _tail(path: pathlib.Path, num_lines: int) -> str:
    return "\n".join(path.read_text(errors="replace").strip().splitlines()[-num_lines:])


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
