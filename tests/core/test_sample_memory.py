# SPDX-License-Identifier: Apache-2.0
"""The memory of one row per example: storages, what it refuses, its state, and what ranks (threads here) exchange."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from fulgurite import distributed
from fulgurite.errors import FulguriteError, RefusedError
from fulgurite.samples import SampleMemory

STORAGES = ["auto", "device", "cpu", "memmap"]


def rows(*values: float) -> Tensor:
    return torch.tensor(values)[:, None].expand(-1, 2).contiguous()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_written_is_read_and_the_rest_counts_as_not_seen(storage, dtype):
    memory = SampleMemory(6, (2,), dtype, storage=storage)
    memory.write(torch.tensor([4, 1]), rows(0.5, 0.25))
    values, seen = memory.read(torch.tensor([1, 2, 4]))
    assert values.dtype is dtype
    assert torch.equal(values.float(), rows(0.25, 0.0, 0.5))
    assert seen.tolist() == [True, False, True]
    assert (memory.size, memory.shape) == (6, (2,))


def test_a_complete_memory_no_longer_asks_what_was_seen_and_still_rejects():
    memory = SampleMemory(2, (2,))
    memory.write(torch.tensor([1]), rows(0.5))
    memory.exchange()
    assert memory.read(torch.tensor([0, 1]))[1].tolist() == [False, True]
    memory.write(torch.tensor([0]), rows(0.25))
    assert memory.read(torch.tensor([0, 1]))[1].tolist() == [True, True], "only an exchange may wait for the device"
    memory.exchange()
    memory.write(torch.tensor([0, 1]), rows(float("nan"), 0.75))
    values, seen = memory.read(torch.tensor([0, 1]))
    assert seen is None
    assert torch.equal(values, rows(0.25, 0.75))
    restored = SampleMemory(2, (2,))
    restored.load_state_dict(memory.state_dict())
    assert restored.read(torch.tensor([0]))[1] is None


def test_memory_is_one_array_in_the_chosen_precision():
    memory = SampleMemory(100, (10,), torch.float16)
    assert memory.values.untyped_storage().nbytes() == 101 * 10 * 2


def test_scalars_per_example():
    memory = SampleMemory(5)
    memory.write(torch.tensor([3, 0]), torch.tensor([2.0, float("nan")]))
    assert memory.values.tolist() == [0, 0, 0, 2.0, 0]
    assert int(memory.rejected) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_row_that_is_not_finite_leaves_the_old_one(bad, dtype):
    memory = SampleMemory(3, (2,), dtype)
    memory.write(torch.tensor([0, 1]), rows(1.0, 2.0))
    memory.write(torch.tensor([0, 1, 2]), torch.tensor([[1.0, bad], [3.0, 3.0], [bad, 0.0]]))
    assert memory.values.tolist() == [[1, 1], [3, 3], [0, 0]]
    assert memory.seen.tolist() == [True, True, False]
    assert int(memory.rejected) == 2


def test_value_that_half_precision_cannot_hold_is_rejected():
    memory = SampleMemory(2, (2,), torch.float16)
    memory.write(torch.tensor([0, 1]), rows(1e6, 1.0))
    assert memory.seen.tolist() == [False, True]


def test_rows_keep_no_graph():
    memory = SampleMemory(2, (2,))
    memory.write(torch.tensor([0]), torch.ones(1, 2, requires_grad=True) * 2)
    assert not memory.values.requires_grad


def test_rows_of_another_shape_are_named():
    memory = SampleMemory(4, (2,), name="Notes")
    with pytest.raises(FulguriteError, match=r"Expected Notes to get rows of shape \[1, 2\], but got \[1, 3\]"):
        memory.write(torch.tensor([0]), torch.zeros(1, 3))


def test_unknown_storage_is_named():
    with pytest.raises(ValueError, match="`storage` of Notes.*'disk'"):
        SampleMemory(4, storage="disk", name="Notes")


def test_rows_that_do_not_fit_are_refused_with_the_number_of_bytes(monkeypatch):
    monkeypatch.setattr("fulgurite.samples.memory.free_bytes", lambda device: 999)
    with pytest.raises(
        RefusedError, match=r"Notes needs 1,000 bytes for 25 examples x 10 .*999 bytes are free \(device\)"
    ):
        SampleMemory(25, (10,), name="Notes")
    SampleMemory(25, (10,), torch.float16, name="Notes")
    SampleMemory(25, (10,), storage="memmap", name="Notes")


def test_auto_takes_the_device_up_to_a_tenth_of_its_free_memory(monkeypatch):
    from fulgurite.samples.memory import _choose_storage

    free = {"cuda": 10_000, "cpu": 10**9}
    monkeypatch.setattr("fulgurite.samples.memory.free_bytes", lambda device: free[device.type])

    def chosen(size: int) -> str:
        return _choose_storage("auto", size, (10,), torch.float32, torch.device("cuda"), "Notes")

    assert chosen(25) == "device"
    assert chosen(26) == "cpu"


def test_memmap_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    memory = SampleMemory(4, (2,), storage="memmap")
    memory.write(torch.tensor([1]), rows(1.0))
    del memory
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("storage", ["cpu", "memmap"])
@pytest.mark.parametrize("restored_as", ["cpu", "memmap"])
def test_state_round_trip_is_safe_and_does_not_alias(tmp_path, storage, restored_as):
    memory = SampleMemory(4, (2,), storage=storage)
    memory.write(torch.tensor([1, 3, 0]), torch.tensor([[1.0, 2], [3, 4], [float("nan"), 0]]))
    torch.save(memory.state_dict(tmp_path), tmp_path / "state.pt")
    kept = memory.values.clone()
    memory.write(torch.tensor([1]), rows(9.0))
    other = SampleMemory(4, (2,), storage=restored_as)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), tmp_path)
    assert torch.equal(other.values, kept)
    assert other.seen.tolist() == [False, True, False, True]
    assert int(other.rejected) == 1
    other.write(torch.tensor([2]), rows(5.0))  # the side file must not change with the memory
    again = SampleMemory(4, (2,))
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), tmp_path)
    assert torch.equal(again.values, kept)


def test_half_precision_state_loads_into_full_precision():
    half, full = SampleMemory(2, (2,), torch.float16), SampleMemory(2, (2,))
    half.write(torch.tensor([0]), rows(0.1))
    full.load_state_dict(half.state_dict())
    assert torch.equal(full.values, half.values.float())


def test_side_file_that_is_missing_or_other_than_it_was_is_named(tmp_path):
    memory = SampleMemory(4, (2,), storage="memmap", name="Notes")
    memory.write(torch.tensor([1]), rows(1.0))
    state = memory.state_dict(tmp_path)
    assert "values" not in state
    (file,) = tmp_path.glob("notes-*.memory")
    assert state["side_file"] == file.name
    for directory in (None, tmp_path / "elsewhere"):
        with pytest.raises(FulguriteError, match=f"side file '{file.name}'.*not in"):
            memory.load_state_dict(state, directory)
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(FulguriteError, match="other contents.*SHA-256"):
        memory.load_state_dict(state, tmp_path)


def test_side_file_that_was_cut_short_is_named(tmp_path):
    memory = SampleMemory(4, (2,), storage="memmap", name="Notes")
    state = memory.state_dict(tmp_path)
    (file,) = tmp_path.glob("notes-*.memory")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(FulguriteError, match="other contents"):
        memory.load_state_dict(state, tmp_path)
    assert file.stat().st_size == 24, "reading must not change the file"


def test_sizes_that_differ_are_named():
    state = SampleMemory(4, (2,), name="Notes").state_dict()
    with pytest.raises(FulguriteError, match="has 5 examples, but Notes's checkpoint remembers 4"):
        SampleMemory(5, (2,), name="Notes").load_state_dict(state)
    with pytest.raises(FulguriteError, match=r"shape \[3\], but its checkpoint has \[2\]"):
        SampleMemory(4, (3,), name="Notes").load_state_dict(state)


class Ranks:
    """Threads that stand for ranks: what `distributed` would do between processes they do in one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
        self.world = world
        self.local = threading.local()
        self.barrier = threading.Barrier(world, timeout=20)
        self.shared: list[Any] = [None] * world
        self.collectives = 0
        monkeypatch.setattr(distributed, "is_distributed", lambda: world > 1)
        monkeypatch.setattr(distributed, "world", lambda: (self.local.rank, world))
        monkeypatch.setattr(distributed, "gather_objects", self.gather)
        monkeypatch.setattr(distributed, "gather_rows", lambda rows, capacity: self.gather(rows.clone()))

    def gather(self, value: Any) -> list[Any]:
        self.shared[self.local.rank] = value
        self.barrier.wait()
        values = list(self.shared)
        self.barrier.wait()
        self.collectives += self.local.rank == 0
        return values

    def run(self, function: Any) -> list[Any]:
        def on(rank: int) -> Any:
            self.local.rank = rank
            try:
                return function(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(on, range(self.world)))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_exchange_gives_every_rank_every_row_and_the_earliest_of_a_repeated_one(monkeypatch, world, dtype):
    """Example 0 is the sampler's padding: drawn first by rank 0, and last by the last rank."""
    ranks = Ranks(monkeypatch, world)

    def run(rank: int) -> SampleMemory:
        memory = SampleMemory(3 * world, (2,), dtype)
        for batch in range(2):
            memory.write(torch.tensor([rank + batch * world]), rows(rank + 10.0 * batch))
        if rank == world - 1:
            memory.write(torch.tensor([0]), rows(99.0))
        before = ranks.collectives
        memory.exchange()
        if rank == 0:
            assert ranks.collectives == before + 1
        return memory

    memories = ranks.run(run)
    expected = rows(*range(world), *(10.0 + r for r in range(world)), *[0.0] * world)
    for memory in memories:
        assert torch.equal(memory.values.float(), expected)
        assert memory.seen.tolist() == [True] * 2 * world + [False] * world


def test_row_that_only_one_rank_could_store_wins_over_one_that_was_not_finite(monkeypatch):
    def run(rank: int) -> SampleMemory:
        memory = SampleMemory(2, (2,))
        memory.write(torch.tensor([0]), rows(float("nan") if rank == 0 else 5.0))
        memory.exchange()
        return memory

    for memory in Ranks(monkeypatch, 2).run(run):
        assert memory.seen.tolist() == [True, False]
        assert torch.equal(memory.values, rows(5.0, 0.0))


def test_rank_that_wrote_nothing_takes_part(monkeypatch):
    def run(rank: int) -> SampleMemory:
        memory = SampleMemory(3, (2,))
        if rank == 1:
            memory.write(torch.tensor([2]), rows(7.0))
        memory.exchange()
        return memory

    for memory in Ranks(monkeypatch, 2).run(run):
        assert memory.seen.tolist() == [False, False, True]


def epochs(memory: SampleMemory, rank: int, parts: slice, state: Any = None, after: int | None = None) -> Any:
    """Two epochs of two batches on each of two ranks, in which both ranks draw example 0; saved after some batches."""
    saved = None
    for number in range(parts.start, parts.stop):
        drawn = {(0, 0): [0, 1], (1, 0): [2, 0], (0, 1): [3, 4], (1, 1): [5]}[rank, number % 2]
        memory.write(torch.tensor(drawn), rows(*(100.0 * number + 10 * rank + i for i in range(len(drawn)))))
        if number % 2 == 1:
            memory.exchange()
        if after == number:
            saved = memory.state_dict()
    return saved


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_resume_on_the_same_ranks_is_exact_wherever_it_stopped(monkeypatch, after):
    """Each rank reads after the resume what it read in the uninterrupted run, also of rows not exchanged yet."""
    ranks = Ranks(monkeypatch, 2)

    def whole(rank: int) -> Any:
        memory = SampleMemory(7, (2,))
        saved = epochs(memory, rank, slice(0, after + 1), after=after)
        at_save = (memory.values.clone(), memory.seen.clone())
        epochs(memory, rank, slice(after + 1, 4))
        return saved, at_save, memory

    first = ranks.run(whole)
    state = first[0][0]
    assert first[1][0] == {"version": 1}

    def resumed(rank: int) -> Any:
        memory = SampleMemory(7, (2,))
        memory.load_state_dict(state)
        at_load = (memory.values.clone(), memory.seen.clone())
        epochs(memory, rank, slice(after + 1, 4))
        return at_load, memory

    for (_, at_save, one), (at_load, other) in zip(first, ranks.run(resumed), strict=True):
        assert torch.equal(at_save[1], at_load[1])
        assert torch.equal(at_save[0][at_save[1]], at_load[0][at_load[1]])
        assert torch.equal(one.seen, other.seen)
        assert torch.equal(one.values[one.seen], other.values[other.seen])


def test_saving_changes_nothing(monkeypatch):
    ranks = Ranks(monkeypatch, 2)

    def run(rank: int) -> Any:
        quiet, saving = SampleMemory(7, (2,)), SampleMemory(7, (2,))
        epochs(quiet, rank, slice(0, 3))
        epochs(saving, rank, slice(0, 3), after=2)
        same = torch.equal(quiet.values, saving.values) and torch.equal(quiet.seen, saving.seen)
        quiet.exchange(), saving.exchange()
        return same and torch.equal(quiet.values, saving.values)

    assert ranks.run(run) == [True, True]


@pytest.mark.parametrize("world", [1, 3])
def test_state_of_two_ranks_loads_on_another_number_of_ranks(monkeypatch, world):
    """What was pending counts as exchanged: of a repeated example the row of the lowest position."""

    def save(rank: int) -> Any:
        memory = SampleMemory(7, (2,))
        state = epochs(memory, rank, slice(0, 3), after=2)
        memory.exchange()
        return state, memory

    (state, expected), _ = Ranks(monkeypatch, 2).run(save)

    def load(rank: int) -> SampleMemory:
        memory = SampleMemory(7, (2,))
        memory.load_state_dict(state)
        return memory

    for memory in Ranks(monkeypatch, world).run(load):
        assert torch.equal(memory.values, expected.values)
        assert torch.equal(memory.seen, expected.seen)


def test_ranks_with_training_sets_of_different_sizes_are_refused(monkeypatch):
    def run(rank: int) -> None:
        with pytest.raises(RefusedError, match="Notes needs all ranks to train on one dataset.*4, 5 examples"):
            SampleMemory(4 + rank, name="Notes")

    Ranks(monkeypatch, 2).run(run)


def test_rows_that_are_left_out_are_reported_once_per_exchange():
    """Fails if a user never learns that the memory lacks what a NaN batch should have written, or is told in every step."""
    memory = SampleMemory(6, (2,), name="Mine")
    rows = torch.ones(3, 2)
    rows[1] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.write(torch.tensor([0, 1, 2]), rows)
        memory.write(torch.tensor([3, 4, 5]), rows)
    with pytest.warns(UserWarning, match=r"Mine did not store 2 rows that were not finite, 2 in all"):
        memory.exchange()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.exchange()
        memory.write(torch.tensor([0, 1, 2]), torch.ones(3, 2))
        memory.exchange()
    memory.write(torch.tensor([0, 1, 2]), rows)
    with pytest.warns(UserWarning, match=r"Mine did not store 1 rows that were not finite, 3 in all"):
        memory.exchange()


def test_what_an_earlier_run_reported_is_not_reported_again():
    """Fails if every resumed run begins with the warnings of the first one."""
    memory = SampleMemory(3, (2,), name="Mine")
    memory.write(torch.tensor([0, 1, 2]), torch.full((3, 2), torch.inf))
    with pytest.warns(UserWarning, match="Mine did not store 3 rows"):
        state = memory.state_dict()
    resumed = SampleMemory(3, (2,), name="Mine")
    resumed.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.exchange()
