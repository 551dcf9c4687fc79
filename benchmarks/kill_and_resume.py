"""Kill Safe RLHF again and again, at random moments, and see that it ends as if nothing had happened.

python benchmarks/kill_and_resume.py                ten kills of one of two processes with four CPU devices each

One run is left alone; its log tells where the others are to be hit. A second one, with a stage cache of its own, loses
one of its processes to SIGKILL within the first tenth of that log, is resumed, loses one within the second tenth, and
so on. Its statistics and the final checkpoint of every stage must then be those of the first run, bit for bit.
"""

import json
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
    """The experiment in `folder`, resumed where it was begun before; all that it says goes to files there."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, FILE, *OPTIONS, "--runs", folder, "--name", "run", "--cache", folder / "cache"]
    command += ["--resume"] if (folder / "run/config.json").exists() else []
    hosts = ["--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.num-processes", str(processes), "--hosts.process-id"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    started = []
    for index in range(processes):
        with open(folder / f"process-{index}.log", "a") as log:
            more = [*hosts, str(index)] if processes > 1 else []
            started.append(subprocess.Popen([*command, *more], env=environment, stdout=log, stderr=log))
    return started


def steps(folder: pathlib.Path) -> list[str]:
    """Every step that the run has logged."""
    file = folder / "run/metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return [f"{line['stage']} {line['step']}" for line in lines]


def wait(happened, processes: list[subprocess.Popen], seconds: float = float("inf")) -> float:
    """Seconds until that, or until all processes have ended, but no more than `seconds`."""
    begin = time.monotonic()
    while not happened() and any(process.poll() is None for process in processes):
        if time.monotonic() - begin > seconds:
            break
        time.sleep(0.01)
    return time.monotonic() - begin


def finish(folder: pathlib.Path, processes: list[subprocess.Popen]) -> None:
    wait(lambda: False, processes)
    if any(process.returncode for process in processes):
        sys.exit(f"a run that nothing disturbed has failed: see {folder}/process-*.log")


def outcome(folder: pathlib.Path) -> dict[str, object]:
    """The statistics, and the fingerprints of the last checkpoint of every stage."""
    found = {"statistics.json": json.loads((folder / "run/statistics.json").read_text())}
    for stage in (folder / "run/checkpoints").iterdir():
        last = max(stage.iterdir(), key=lambda path: int(path.name))
        found[f"{stage.name} {last.name}"] = json.loads((last / "description/metadata").read_text())["content"]["leaves"]
    return found


def main(kills: int = 10, processes: int = 2, devices: int = 4, seed: int = 0) -> None:
    """Kill `kills` times one of `processes`, with `devices` CPU devices each."""
    root, draw, failed = pathlib.Path(tempfile.mkdtemp(prefix="kill-and-resume-")), random.Random(seed), []
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "jax"))
    os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    whole, hit = root / "whole", root / "hit"
    print(f"everything is in {root}", flush=True)
    running = start(whole, processes, devices)
    times = [0.0]  # of the start and of every step
    while any(process.poll() is None for process in running):
        times.append(times[-1] + wait(lambda: len(steps(whole)) >= len(times), running))
    finish(whole, running)
    print(f"undisturbed: {times[-1]:.0f} s\n\n kill  of process  after (+ s since then)       others ended in", flush=True)
    for kill in range(1, kills + 1):
        running = start(hit, processes, devices)
        # The next hits come after a number of steps from [first, last], of which 0 is the start.
        first, end = len(steps(hit)), len(times) - 1
        target = min(end - 1, draw.randint(first, first + (end - first - 1) // (kills - kill + 1)))
        wait(lambda: len(steps(hit)) >= target, running)
        # Anywhere until the next step; what was just resumed has to get there from the start.
        pause = draw.uniform(0, times[1] if target == first else times[target + 1] - times[target])
        waited, victim = wait(lambda: False, running, pause), draw.randrange(processes)
        if all(process.poll() is not None for process in running):
            print(f"the run ended before kill {kill}", flush=True)
            break
        running[victim].kill()
        place = (["the start"] + steps(hit))[-1]
        if list(hit.glob("run/checkpoints/*/*.orbax-checkpoint-tmp*")):
            place += ", in a save"
        seconds = wait(lambda: False, running, PATIENCE)
        if left := [index for index, process in enumerate(running) if process.poll() is None]:
            failed.append(f"after kill {kill} processes {left} did not end in {PATIENCE} s")
            for process in running:
                process.kill()
                process.wait()
        print(f"{kill:5}  {victim:10}  {f'{place} (+ {waited:.1f})':<32} {seconds:5.1f} s", flush=True)
    finish(hit, start(hit, processes, devices))
    one, other = outcome(whole), outcome(hit)
    failed += [f"{name} differs" for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
    if failed:
        sys.exit("\n".join(failed))
    print(f"\nbitwise equal: statistics.json and the final checkpoints of {len(one) - 1} stages")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
