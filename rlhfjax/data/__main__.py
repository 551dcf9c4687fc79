"""`python -m rlhfjax.data FILE...`: see `main`."""

import functools
import json
import pathlib
import sys
from typing import Literal

import tyro

from rlhfjax.data.formats import read
from rlhfjax.data.tokenize import Lengths, demonstrations, load_tokenizer, preference_batch, prompts


def main(
    files: tyro.conf.Positional[tuple[pathlib.Path, ...]], shape: str | None = None,
    tokenizer: pathlib.Path | None = None, max_prompt: int | None = None, max_response: int | None = None,
    long_prompts: Literal["cut", "drop"] = "cut", strict: bool = False, out: pathlib.Path | None = None,
) -> None:  # fmt: skip
    """Report which rows of preference files can be learned from, and why the others cannot.

    Args:
        files: .jsonl, .json, .csv (each also .gz), .parquet, or a directory of `save_to_disk`.
        shape: of their rows, if the columns do not tell.
        tokenizer: a local directory or tokenizer.json, to count what is too long as well.
        max_prompt: tokens of a prompt.
        max_response: tokens of a response, its end included.
        long_prompts: whether a longer prompt loses its beginning, or the row is dropped.
        strict: fail at the first kind of row that is dropped.
        out: a JSON file for the report.
    """
    lengths = Lengths(max_prompt=max_prompt, max_response=max_response, long_prompts=long_prompts)
    records, report = read(files, shape=shape)
    if tokenizer is not None and records:
        chat = load_tokenizer(tokenizer)
        by_number = {num: [record for record in records if len(record.responses) == num] for num in range(3)}
        good = [record for record in by_number[1] if record.pref is None or record.pref > 0.5]
        for job, rows in (
            (prompts, by_number[0]), (demonstrations, good),
            (preference_batch, [record for record in by_number[2] if record.pref is not None]),
            (functools.partial(preference_batch, harm=True), [r for r in by_number[2] if r.pref is None]),
        ):  # fmt: skip
            if rows:
                job(rows, chat, lengths, report=report)
    print(report.table())
    if out is not None:
        out.write_text(json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n")
    if strict:
        report.check()


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (OSError, ImportError, ValueError) as error:
        sys.exit(str(error))
