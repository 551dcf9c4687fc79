"""What became of every row, before anything is trained on them."""

import collections
import dataclasses
import importlib
from typing import Any


class Drop(Exception):
    """A row that cannot be used. reason: the kind of trouble, in words that can be counted; detail: what exactly."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclasses.dataclass
class FileReport:
    """Of one file: its shape, rows read and kept, `{reason: ["row N: detail", ...]}` of those dropped, and
    `{what: number}` of those kept with a loss (a response cut, say)."""

    file: str
    shape: str
    read: int = 0
    kept: int = 0
    dropped: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    noted: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def num_dropped(self) -> int:
        return sum(map(len, self.dropped.values()))

    def drop(self, drop: Drop, row: int) -> None:
        self.dropped.setdefault(drop.reason, []).append(f"row {row}: {drop.detail}")

    def lose(self, drop: Drop, row: int) -> None:
        """Drop a row that was kept so far."""
        self.drop(drop, row)
        self.kept -= 1

    def note(self, what: str, number: int) -> None:
        if number:
            self.noted[what] = self.noted.get(what, 0) + number


@dataclasses.dataclass
class Report:
    """`print(report.table())`; `report.to_json()` for a run directory; `report.check()` where no row may be lost."""

    files: list[FileReport] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def of(self, source: str) -> FileReport:
        """The report on the file of a record's `source`, "file:row"; begun where there is none yet."""
        name = source.rpartition(":")[0]
        found = next((file for file in self.files if file.file == name), None)
        if found is None:
            self.files.append(found := FileReport(file=name, shape="records"))
        return found

    def to_json(self, examples: int = 20) -> dict[str, Any]:
        """As JSON shows it; of each reason the count and the first rows."""
        short = lambda rows: {"count": len(rows), "rows": rows[:examples]}
        files = [{**dataclasses.asdict(file), "dropped": {why: short(rows) for why, rows in file.dropped.items()}}
                 for file in self.files]  # fmt: skip
        return {"files": files, "notes": self.notes}

    def table(self, examples: int = 3) -> str:
        """Markdown, with the first rows of every reason below."""
        lines = ["| file | shape | read | kept | dropped | kept, with a loss |", "|---|---|---|---|---|---|"]
        count = lambda counts: ", ".join(f"{number} {what}" for what, number in counts.items()) or "-"
        total = collections.Counter()
        for file in self.files:
            total.update(read=file.read, kept=file.kept)
            dropped = count({why: len(rows) for why, rows in file.dropped.items()})
            cells = (file.file, file.shape, file.read, file.kept, dropped, count(file.noted))
            lines.append(f"| {' | '.join(map(str, cells))} |")
        if len(self.files) > 1:
            lines.append(f"| all | | {total['read']} | {total['kept']} | {total['read'] - total['kept']} | |")
        for file in self.files:
            for why, rows in file.dropped.items():
                more = f" (and {len(rows) - examples} more)" if len(rows) > examples else ""
                lines.append(f"\n{file.file}, {why}: {'; '.join(rows[:examples])}{more}")
        return "\n".join([*lines, *(f"\nNote: {note}" for note in self.notes)])

    def check(self) -> None:
        """Raise ValueError for the first kind of row that was dropped, with the rows."""
        for file in self.files:
            for why, rows in file.dropped.items():
                raise ValueError(f"{file.file}: {len(rows)} rows dropped, {why}: {'; '.join(rows[:20])}"
                                 f"{'; ...' if len(rows) > 20 else ''}. Mend them, or leave out strict")  # fmt: skip


def optional_import(module: str, extra: str, why: str):
    """A module that only some need, or an ImportError that says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{why}, which needs {module}: pip install 'rlhfjax[{extra}]' ({error})") from error
