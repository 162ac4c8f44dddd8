"""Batches: one endless order, the same on any number of hosts, from any position."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from jaxheads.data import ArrayRows, Batches, prove_disjoint
from jaxheads.data.disjoint import check_examples, check_settings

N = 23


def rows_of(n: int = N) -> ArrayRows:
    return ArrayRows({"number": np.arange(n), "square": np.arange(n)[:, None] ** 2})


def take(batches: Batches, count: int, position: int = 0) -> list[np.ndarray]:
    found = [*itertools.islice(batches.iterate(position), count)]
    for batch in found:
        np.testing.assert_array_equal(batch["square"][:, 0], batch["number"] ** 2)
    return [batch["number"] for batch in found]


def test_every_epoch_holds_every_row_once_and_has_its_own_order():
    stream = np.concatenate(take(Batches(rows_of(), 5, seed=0), 23))
    epochs = stream.reshape(5, N)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(N), (5, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_the_seed_decides_the_order_and_seeds_share_no_epoch():
    def order(seed: int) -> set[tuple[int, ...]]:
        stream = np.concatenate(take(Batches(rows_of(), N, seed=seed), 3))
        return {tuple(epoch) for epoch in stream.reshape(3, N)}

    assert order(3) == order(3)
    assert not order(3) & order(4)


@pytest.mark.parametrize("position", [0, 1, 8, 19, 23, 101])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_any_number_of_hosts_goes_on_exactly(hosts, position):
    alone = np.concatenate(take(Batches(rows_of(), 1, seed=5), position + 24))
    parts = [Batches(rows_of(), 8, seed=5, host=host, hosts=hosts) for host in range(hosts)]
    read = [take(part, 3, position) for part in parts]
    for step in range(3):
        first = position + 8 * step
        together = np.concatenate([read[host][step] for host in range(hosts)])
        np.testing.assert_array_equal(together, alone[first : first + 8])
        for part, own in zip(parts, read, strict=True):
            np.testing.assert_array_equal(part.ids(first), own[step])


def test_a_run_goes_on_with_more_and_more_hosts_and_another_batch_size():
    alone = np.concatenate(take(Batches(rows_of(), 1, seed=2), 60))
    stream, position = [], 0
    for hosts, size, steps in ((1, 4, 3), (2, 4, 5), (4, 8, 2), (2, 6, 2)):
        read = [
            take(Batches(rows_of(), size, seed=2, host=h, hosts=hosts), steps, position)
            for h in range(hosts)
        ]
        stream += [read[host][step] for step in range(steps) for host in range(hosts)]
        position += size * steps
    np.testing.assert_array_equal(np.concatenate(stream), alone[:60])


def test_an_iterator_that_is_left_stops_its_threads():
    class Counted(ArrayRows):
        read = 0

        def __getitem__(self, indices: np.ndarray) -> Any:
            self.read += 1
            return super().__getitem__(indices)

    rows = Counted(np.arange(N))
    batches = Batches(rows, 4, seed=0).iterate()
    next(batches)
    batches.close()
    assert 1 <= rows.read <= 8, "reads ahead by a bounded number of batches"


def test_an_error_of_a_row_reaches_the_reader():
    class Broken(ArrayRows):
        def __getitem__(self, indices: np.ndarray) -> Any:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        next(Batches(Broken(np.arange(N)), 4, seed=0).iterate())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, r"batch_size must lie in 1..23 \(rows of the data\), got 0"),
        ({"batch_size": 24}, "batch_size must lie in 1..23 .* got 24"),
        ({"batch_size": 9, "hosts": 2}, "batch_size 9 is not divisible by the number of hosts, 2"),
        ({"host": 2, "hosts": 2}, r"host must lie in 0..1 \(2 hosts\), got 2"),
        ({"host": -1, "hosts": 2}, "got -1"),
        ({"hosts": 0}, "hosts must be at least 1, got 0"),
        ({"seed": -1}, "seed must lie in 0..2"),
        ({"rows": rows_of(0)}, "no rows to make batches of"),
    ],
)
def test_settings_are_checked_before_anything_is_read(change, message):
    settings = {"rows": rows_of(), "batch_size": 8, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        Batches(settings.pop("rows"), settings.pop("batch_size"), **settings)


def test_positions_and_rows_are_checked():
    batches = Batches(rows_of(), 4, seed=0)
    for call in (batches.ids, batches.iterate):
        with pytest.raises(ValueError, match="position must be at least 0, got -4"):
            call(-4)
    with pytest.raises(ValueError, match=r"one common leading axis, got shapes \[\(3,\), \(4,\)\]"):
        ArrayRows([np.zeros(3), np.zeros(4)])


# The hosts' proof.


def test_one_process_reads_the_whole_batch():
    batches = Batches(rows_of(), 8, seed=1)
    for position in (0, 16, 20):
        table = prove_disjoint(batches, position)
        np.testing.assert_array_equal(table, batches.ids(position)[None])


def test_a_row_may_come_twice_in_a_batch_that_ends_an_epoch():
    batches = Batches(rows_of(), 20, seed=1, host=1, hosts=2)
    whole = np.concatenate([batches.examples(20, host) for host in range(2)])
    assert len(set(whole)) == 20 > len(set(whole % N))
    found = check_examples([0, 1], whole.reshape(2, 10), whole)
    np.testing.assert_array_equal(found, whole.reshape(2, 10))


def test_one_process_that_reads_half_is_caught():
    with pytest.raises(ValueError, match="divided among 2 hosts, but there are 1"):
        prove_disjoint(Batches(rows_of(), 8, seed=1, hosts=2), 0)
    with pytest.raises(ValueError, match="4 of the batch's 8 examples; 4 are read by none"):
        prove_disjoint(Batches(rows_of(), 8, seed=1, hosts=2), 0, hosts=2)


def test_what_the_table_of_hosts_must_hold():
    whole = np.array([5, 3, 9, 7])
    good = np.array([[9, 7], [5, 3], [9, 7]])
    found = check_examples([1, 0, 1], good, whole)
    np.testing.assert_array_equal(found, [[5, 3], [9, 7]])
    with pytest.raises(ValueError, match="hosts 0 and 1 would both read example 3"):
        check_examples([0, 1], np.array([[5, 3], [3, 7]]), whole)
    with pytest.raises(ValueError, match="processes 0 and 1 of host 0 read different rows"):
        check_examples([0, 0], np.array([[5, 3], [9, 7]]), whole)
    with pytest.raises(ValueError, match=r"hosts \[0\] .* 2 are read by none, such as example 7"):
        check_examples([0, 0], np.array([[5, 3], [5, 3]]), whole)
    with pytest.raises(
        ValueError, match="disagree on seed of the data: process 0 has 1, process 2"
    ):
        check_settings(np.array([[9, 4, 1, 1, 0], [9, 4, 1, 1, 0], [9, 4, 2, 1, 0]]))


def one_of_two_processes(address: str, number: str) -> dict[str, Any]:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=int(number))
    host = int(number)

    def said(position: int, n: int = N, seed: int = 1, **settings: int) -> Any:
        try:
            batches = Batches(rows_of(n), 8, seed=seed, **settings)
            return prove_disjoint(batches, position).tolist()
        except ValueError as error:
            return str(error)

    far = 10**12 + 3  # beyond 32 bits
    changed = ArrayRows({"number": np.arange(N) + host})
    try:
        prove_disjoint(Batches(changed, 8, seed=1, host=host, hosts=2), 0)
        other = "nothing"
    except ValueError as error:
        other = str(error)
    return {
        "right": said(0, host=host, hosts=2),
        "crossing": said(20, host=host, hosts=2),
        "far": said(far, host=host, hosts=2),
        "all slice 0": said(0, host=0, hosts=2),
        "hosts forgotten": said(0),
        "seeds": said(0, seed=host, host=host, hosts=2),
        "sizes": said(0, n=N + host, host=host, hosts=2),
        "rows": other,
    }


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, __file__, address]
    quiet = os.environ | {"JAX_PLATFORMS": "cpu"}
    both = [
        subprocess.Popen(
            [*command, str(n)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet
        )
        for n in range(2)
    ]
    found = []
    for process in both:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        found.append(json.loads(out.splitlines()[-1]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "position"), [("right", 0), ("crossing", 20), ("far", 10**12 + 3)]
)
def test_two_processes_prove_that_they_read_the_batch_once(told, case, position):
    alone = Batches(rows_of(), 8, seed=1)
    for process in told:
        assert np.ravel(process[case]).tolist() == alone.ids(position).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("all slice 0", "processes stand for hosts [0] and read 4 of the batch's 8 examples"),
        ("hosts forgotten", "batches are divided among 1 hosts, but there are 2"),
        ("seeds", "processes disagree on seed of the data: process 0 has 0, process 1 has 1"),
        ("sizes", "processes disagree on rows of the data: process 0 has 23, process 1 has 24"),
        ("rows", "processes disagree on checksum of the rows of the data"),
    ],
)
def test_two_processes_are_stopped_both(told, case, message):
    for process in told:
        assert str(process[case]).startswith(message), process[case]


if __name__ == "__main__":
    print(json.dumps(one_of_two_processes(*sys.argv[1:])))
