"""Kill Safe RLHF again and again, at random moments, and see that it ends as if nothing had happened.

python benchmarks/kill_and_resume.py                ten kills of one of two processes with four CPU devices each

One run is left alone; its log tells where to hit. Another, with a stage cache of its own, loses one of its processes to
SIGKILL somewhere in the first tenth of what is to be logged, is resumed, loses one in the next tenth, and so on. Its
statistics and the final checkpoint of every stage must then be those of the first run, bit for bit.
"""

import json
import math
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import time

import tyro

FILE = pathlib.Path(__file__).parents[1] / "experiments/safe_rlhf/constrained_ppo.py"
OPTIONS = "--scale smoke --network.num-layers 1 --guard.checkpoint-every 1".split()
PATIENCE = 120  # seconds in which the other processes must end by themselves


def start(folder: pathlib.Path, processes: int, devices: int) -> list[subprocess.Popen]:
    """The experiment in `folder`, resumed where it has been begun before; what it says goes to files there."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, FILE, *OPTIONS, "--runs", folder, "--name", "run", "--cache", folder / "cache"]
    command += ["--resume"] if (folder / "run/config.json").exists() else []
    hosts = ["--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.num-processes", str(processes), "--hosts.process-id"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "jax"),  # shared by all
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    started = []
    for index in range(processes):
        with open(folder / f"process-{index}.log", "a") as log:
            more = [*hosts, str(index)] if processes > 1 else []
            started.append(subprocess.Popen([*command, *more], env=environment, stdout=log, stderr=log))
    return started


def logged(folder: pathlib.Path) -> list[str]:
    """The steps that the run has logged, such as "plain 3"."""
    file = folder / "run/metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return [f"{line['stage']} {line['step']}" for line in lines]


def wait(folder: pathlib.Path, started: list[subprocess.Popen], steps: float = math.inf, seconds: float = math.inf):
    """Until so many steps are logged, so many seconds have passed or all processes have ended: the seconds it took."""
    begin = time.monotonic()
    while any([process.poll() is None for process in started]) and len(logged(folder)) < steps:
        if time.monotonic() - begin > seconds:
            break
        time.sleep(0.01)
    return time.monotonic() - begin


def check(folder: pathlib.Path, started: list[subprocess.Popen]) -> None:
    wait(folder, started)
    if any(process.returncode for process in started):
        sys.exit(f"the run has failed without being killed: see {folder}/process-*.log")


def outcome(folder: pathlib.Path) -> dict[str, object]:
    """The statistics, and the fingerprints of the last checkpoint of every stage."""
    found = {"statistics.json": json.loads((folder / "run/statistics.json").read_text())}
    for stage in (folder / "run/checkpoints").iterdir():
        last = max(int(path.name) for path in stage.iterdir() if path.name.isdecimal())
        content = json.loads((stage / str(last) / "description/metadata").read_text())["content"]
        found[f"the checkpoint {stage.name} {last}"] = content["leaves"]
    return found


def main(kills: int = 10, processes: int = 2, devices: int = 4, seed: int = 0) -> None:
    """Kill `kills` times one of `processes`, which have `devices` CPU devices each."""
    root, draw, failures = pathlib.Path(tempfile.mkdtemp(prefix="kill-and-resume-")), random.Random(seed), []
    whole, hit = root / "whole", root / "hit"
    print(f"everything is in {root}", flush=True)
    started, times = start(whole, processes, devices), [0.0]  # of the start, of every step, and of the end
    while any([process.poll() is None for process in started]):
        times.append(times[-1] + wait(whole, started, steps=len(times)))
    check(whole, started)
    print(f"undisturbed: {times[-1]:.0f} s\n", flush=True)
    print(f"{'kill':>4}  {'process':>7}  {'after (+ s)':<35} others ended in", flush=True)
    for kill in range(1, kills + 1):
        started = start(hit, processes, devices)
        done, total = len(logged(hit)), len(times) - 2
        target = draw.randint(done, done + (total - done) // (kills + 1 - kill))
        wait(hit, started, steps=target)
        # Anywhere until the next step, which a run that has just been resumed reaches from its start.
        pause = draw.uniform(0, times[1] if target == done else times[target + 1] - times[target])
        waited, victim = wait(hit, started, seconds=pause), draw.randrange(processes)
        if all([process.poll() is not None for process in started]):
            print(f"the run has ended before kill {kill}", flush=True)
            break
        place = [f"start {kill}", *logged(hit)][-1] if target > done or not done else f"start {kill}, {logged(hit)[-1]}"
        place += ", in a save" * any(hit.glob("run/checkpoints/*/*.orbax-checkpoint-tmp*"))
        started[victim].kill()
        seconds = wait(hit, started, seconds=PATIENCE)
        if left := [index for index, process in enumerate(started) if process.poll() is None]:
            failures.append(f"after kill {kill} processes {left} have not ended in {PATIENCE} s")
            for index in left:
                started[index].kill()
                started[index].wait()
        print(f"{kill:4}  {victim:7}  {f'{place} (+ {waited:.1f})':<35} {seconds:5.1f} s", flush=True)
    check(hit, start(hit, processes, devices))
    one, other = outcome(whole), outcome(hit)
    failures += [f"{name} differs" for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
    if failures:
        sys.exit("\n".join(failures))
    print(f"\nbitwise equal: statistics.json and the final checkpoints of {len(one) - 1} stages")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
