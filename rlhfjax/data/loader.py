"""Batches by step: a pure function of (seed, step), so a run resumes at any step, on any number of hosts."""

from typing import Any

import numpy as np

from rlhfjax.rl.fit import batch_order, take


class Batches:
    """`batches[step]`, for step in `[0, num_steps)`: the rows that `rl.fit.batch_order` names. A source for grain:

        grain.MapDataset.source(Batches(rows, 32, 1_000, seed=0)).map(...)[first:]    # resumed at step `first`

    Args:
        data: a pytree of host arrays (a PreferenceBatch, say), of which a batch is `take`n; or rows by index, a list
            or a TFDS data source, of which a batch is a list.
        process_index, process_count: the piece of every batch that this host reads. Pieces of equal length in order of
            the hosts make up the batch, whatever their number.
    Raises:
        ValueError: too few rows for a batch; a batch that does not divide among the hosts; no such host.
    """

    def __init__(
        self, data: Any, batch_size: int, num_steps: int, *, seed: int, process_index: int = 0, process_count: int = 1
    ):
        if batch_size % process_count:
            raise ValueError(f"a batch of {batch_size} does not divide among {process_count} hosts")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index must be from 0 to {process_count - 1}, got {process_index}")
        self.data, self.batch_size, self.num_steps, self.seed = data, batch_size, num_steps, seed
        own = batch_size // process_count
        self.own = slice(process_index * own, (process_index + 1) * own)
        self.rows(0)

    def rows(self, step: int) -> np.ndarray:
        """Which rows this host reads at a step: `[batch_size / process_count]`."""
        return batch_order(self.seed, step, 1, len(self.data), self.batch_size)[0, self.own]

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> Any:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is not among the {self.num_steps} steps")
        rows = self.rows(int(step))
        if hasattr(self.data, "__getitems__"):
            return list(self.data.__getitems__(rows.tolist()))
        return [self.data[row] for row in rows] if isinstance(self.data, list) else take(self.data, rows)
