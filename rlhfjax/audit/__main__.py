"""`python -m rlhfjax.audit RUN_DIR`: see `main`."""

import pathlib
import sys

import tyro

from rlhfjax.audit.probes import load
from rlhfjax.audit.report import audit, write
from rlhfjax.io.run import read_json


def main(run: tyro.conf.Positional[pathlib.Path], cache: pathlib.Path | None = None, stages: tuple[str, ...] = (),
         declarations: pathlib.Path | None = None, out: pathlib.Path | None = None) -> None:  # fmt: skip
    """Audit the finished run in a directory for open problems of RLHF: audit.json, audit.md and figures.

    Args:
        cache: of its stages; by default the one that it has used.
        stages: which to audit where several have one role, such as one of several policies.
        declarations: a JSON file of what a person declares on items "9", "10" and "11", and "signed_by".
        out: where to write; by default `audit` in the run's directory.
    """
    parts, out, status = load(run, cache, stages), out or run / "audit", read_json(run / "status.json")["status"]
    if status != "finished":
        raise ValueError(f"{run} has not finished ({status}): continue it with --name {run.name} --resume, then audit")
    write(audit(parts, read_json(declarations) if declarations else {}), parts, out)
    print(f"all in {out}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
