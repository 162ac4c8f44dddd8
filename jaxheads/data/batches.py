"""`Batches`: the endless shuffled sequence of rows, cut into batches and shared among hosts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from jaxheads.data.rows import Rows


class Batches:
    """Batches of rows in an order that depends on the seed alone.

    The rows, shuffled anew for every epoch, form one endless sequence of examples. The batch at
    position p holds the examples p, ..., p+B-1 of it, whatever the number of hosts; host h of n
    reads the h-th of n equal parts of that batch. So a run that stopped at position p goes on
    exactly there, on any number of hosts and with any batch size. A batch may run from the end
    of one epoch into the next.

    Attributes:
      rows: the N rows.
      batch_size: B, examples of the global batch.
      seed: of the shuffle.
      host: h, which part this process reads.
      hosts: n, into how many parts a batch is divided.
    """

    def __init__(
        self, rows: Rows, batch_size: int, *, seed: int, host: int = 0, hosts: int = 1
    ) -> None:
        """Sets up the order; nothing is read.

        Raises:
          ValueError: no rows, a batch size below 1, above N or not divisible by the hosts, a
            seed outside 0..2**63-1, or a host outside 0..hosts-1.
        """
        n = len(rows)
        if n < 1:
            raise ValueError("no rows to make batches of: expected at least one")
        if not 1 <= batch_size <= n:
            raise ValueError(f"batch_size must lie in 1..{n} (rows of the data), got {batch_size}")
        if hosts < 1:
            raise ValueError(f"hosts must be at least 1, got {hosts}")
        if not 0 <= host < hosts:
            raise ValueError(f"host must lie in 0..{hosts - 1} ({hosts} hosts), got {host}")
        if batch_size % hosts:
            raise ValueError(
                f"batch_size {batch_size} is not divisible by the number of hosts, {hosts}"
            )
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must lie in 0..2**63-1, got {seed}")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.host, self.hosts = host, hosts
        # grain shuffles epoch e by seed + e; hashed, runs with neighbouring seeds share no epoch.
        hashed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._order = grain.MapDataset.range(n).shuffle(seed=hashed).repeat()

    def examples(self, position: int, host: int | None = None) -> np.ndarray:
        """Numbers of the examples of a host's part of a batch, unique in the endless sequence.

        Args:
          position: number of the batch's first example, from 0.
          host: whose part; default this host's.

        Returns:
          int64 [B/n]: epoch * N + number of the row.

        Raises:
          ValueError: a position below 0.
        """
        if position < 0:
            raise ValueError(f"position must be at least 0, got {position}")
        part = self.batch_size // self.hosts
        first = position + part * (self.host if host is None else host)
        n = len(self.rows)
        places = range(first, first + part)
        return np.array([p // n * n + int(self._order[p]) for p in places], np.int64)

    def ids(self, position: int) -> np.ndarray:
        """Numbers of the rows of this host's part of the batch at a position: int64 [B/n].

        Raises:
          ValueError: a position below 0.
        """
        return self.examples(position) % len(self.rows)

    def iterate(self, position: int = 0) -> Iterator[Any]:
        """This host's parts of the batches at `position`, `position` + B, and so on without end.

        Two threads read ahead by up to four batches.

        Args:
          position: number of the first batch's first example, from 0.

        Yields:
          The rows' pytree of numpy arrays with leading axis B/n.

        Raises:
          ValueError: a position below 0.
        """
        if position < 0:
            raise ValueError(f"position must be at least 0, got {position}")
        return self._read(position)

    def _read(self, position: int) -> Iterator[Any]:
        def load(number: int) -> Any:
            return self.rows[self.ids(position + number * self.batch_size)]

        ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        numbers = grain.MapDataset.range(sys.maxsize)
        batches = iter(numbers.map(load).to_iter_dataset(ahead))
        try:
            yield from batches
        finally:
            batches.close()
