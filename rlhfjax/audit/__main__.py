"""`python -m rlhfjax.audit RUN_DIR`: see `main`."""

import pathlib
import sys

import tyro

from rlhfjax.audit.probes import load
from rlhfjax.audit.report import audit, side_by_side, write
from rlhfjax.io.run import read_json


def main(run: tyro.conf.Positional[pathlib.Path], beside: pathlib.Path | None = None, cache: pathlib.Path | None = None,
         stages: tuple[str, ...] = (), declarations: pathlib.Path | None = None,
         out: pathlib.Path | None = None) -> None:  # fmt: skip
    """Audit the finished run in a directory for open problems of RLHF: audit.json, audit.md and figures.

    Args:
        beside: another run to audit as well; both side by side are printed, and written to beside.md.
        cache: of its stages; by default the one that it has used.
        stages: which to audit where several have one role, such as one of several policies.
        declarations: a JSON file of what a person declares on items "9", "10" and "11", and "signed_by".
        out: where to write, of two runs to a directory of each; by default `audit` in a run's directory.
    """
    found = []
    for path in (run, beside) if beside else (run,):
        parts, status = load(path, cache, stages), read_json(path / "status.json")["status"]
        if status != "finished":
            raise ValueError(f"{path} has not finished ({status}): go on with --name {path.name} --resume, then audit")
        found.append(audit(parts, read_json(declarations) if declarations else {}))
        write(found[-1], parts, place := (out / path.name if beside else out) if out else path / "audit")
        print(f"all in {place}")
    if beside:
        (text := (out or run / "audit") / "beside.md").write_text(side_by_side(*found))
        print(text.read_text())


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
