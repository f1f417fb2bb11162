# SPDX-License-Identifier: Apache-2.0
"""PS-KD and the core on two ranks (gloo, CPU), against one rank: `ddp` by script, `ddp_spawn` and `ddp_fork`.

Each strategy is started once; what its ranks saw comes back in files, and every test asserts on them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fulgurite_plugins.distillation import PSKD
from tests.distributed import scenarios
from tests.helpers import weights

pytestmark = [
    pytest.mark.xdist_group("distributed"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]
SECONDS = 150
"""After this long all processes of a launch are killed; on an idle machine it takes a tenth of it."""


def launch(start_method: str, folder: Path) -> Path:
    """Run the worker in a process group of its own, which never outlives the call."""
    foreign = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED", "FULGURITE")
    environment = {key: value for key, value in os.environ.items() if key not in foreign} | {"OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.worker", start_method, str(folder)],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: Any = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            status = f"killed after {SECONDS} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status != 0:
        pytest.fail(f"Worker {start_method}: {status}\n{(folder / 'log.txt').read_text()[-6000:]}")
    return folder


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch("popen", tmp_path_factory.mktemp("script"))


def of_ranks(folder: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]


def same(first: Any, second: Any) -> None:
    """Bit for bit."""
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_memory_and_parameters_on_two_ranks_equal_those_of_one_rank(script, tmp_path):
    a, b = of_ranks(script, "memory")
    same(a, b)
    one = scenarios.memory(1, tmp_path)
    assert a["seen"].all()
    close(a["values"], one["values"])
    close(a["weights"], one["weights"])


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_started_from_python_the_ranks_do_the_same_and_the_parent_gets_a_clean_module(start_method, script, tmp_path):
    if start_method == "fork" and not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    launch(start_method, tmp_path)
    a, b = of_ranks(tmp_path, "child")
    same(a, b)
    assert a["world"] == 2
    same(a, of_ranks(script, "child")[0])
    parent = torch.load(tmp_path / "parent.pt", weights_only=True)
    assert parent["patched"] == []
    same(parent["weights"], a["weights"])


def test_padding_of_the_sampler_does_not_write_a_row_twice(script, tmp_path):
    """Example 0 is drawn again by rank 1, later than by rank 0: the row of rank 0, as on one rank, wins everywhere."""
    a, b = of_ranks(script, "padded")
    drawn = Counter(chain(*a["indices"], *b["indices"]))
    assert [index for index, times in drawn.items() if times > 1] == [0]
    one = scenarios.padded(1, tmp_path)
    close(a["values"], one["values"])
    for key in ("values", "seen", "later", "weights"):
        same(a[key], b[key])


def test_every_row_is_the_prediction_made_for_it_on_whichever_rank(script):
    a, b = of_ranks(script, "shuffled")
    same((a["values"], a["weights"]), (b["values"], b["weights"]))
    assert a["made"].keys() | b["made"].keys() == set(range(53))
    for index, row in enumerate(a["values"]):
        candidates = [rank["made"][index] for rank in (a, b) if index in rank["made"]]
        assert any(torch.equal(row, candidate) for candidate in candidates)


def test_switched_off_it_is_bit_equal_to_training_without_it(script):
    a, b = of_ranks(script, "off")
    same(a["with"], a["without"])
    same(a, b)


def test_snapshot_teacher_is_the_same_on_all_ranks_and_as_on_one(script, tmp_path):
    a, b = of_ranks(script, "snapshot")
    same(a, b)
    close(a, scenarios.snapshot(1, tmp_path))


def test_penalties_are_part_of_the_synchronised_loss(script, tmp_path):
    a, b = of_ranks(script, "penalties")
    same(a, b)
    close(a, scenarios.penalties(1, tmp_path))


def test_transform_gradients_sees_gradients_reduced_over_ranks_once_per_update(script, tmp_path):
    a, b = of_ranks(script, "gradients")
    same(a, b)
    one = scenarios.gradients(1, tmp_path)
    assert len(a["gradients"]) == len(one["gradients"]) == 2
    close(a["gradients"], one["gradients"])


def test_memory_costs_one_collective_per_epoch_and_none_per_step(script):
    for rank in of_ranks(script, "collectives"):
        extra = Counter(map(tuple, rank["with"]))
        extra.subtract(map(tuple, rank["without"]))
        in_steps = {call: times for call, times in extra.items() if call[1] is not None and times}
        assert all(batch == 0 and epoch == 0 for epoch, batch, _ in in_steps), in_steps  # sizes compared, once
        between = {call: times for call, times in extra.items() if call[1] is None and times}
        assert between == {(epoch, None, "all_gather"): 1 for epoch in range(3)}


def test_resume_in_the_middle_of_an_epoch_is_exact(script):
    a, b = of_ranks(script, "resumed")
    same(a, b)
    for teacher in ("memory", "snapshot"):
        assert a[teacher]["steps"] == 12
        same(a[teacher]["resumed"], a[teacher]["whole"])
    same(*a["memories"])


def test_resume_at_the_end_of_an_epoch_is_exact(script):
    a, b = of_ranks(script, "resumed_at_epoch_end")
    same(a, b)
    same(a["resumed"], a["whole"])
    same(*a["memories"])


@pytest.mark.parametrize("teacher", ["memory", "snapshot"])
def test_checkpoint_of_two_ranks_continues_on_one(script, teacher):
    """From the end of an epoch, after which one rank draws the batches that two ranks draw together."""
    a, _ = of_ranks(script, teacher)
    plugin = PSKD(teacher=teacher)
    module, _ = scenarios.train(1, [plugin], epochs=3, ckpt=script / teacher / "epoch=1.ckpt")
    close(weights(module), a["weights"])
    if teacher == "memory":
        assert plugin.memory is not None
        close(plugin.memory.values, a["values"])


def test_training_subset_is_divided_among_ranks_with_equal_numbers_of_steps(script, tmp_path):
    a, b = of_ranks(script, "subset")
    one = scenarios.subset(1, tmp_path)["epochs"]
    chosen = list(range(1, 60, 2))[:27]
    for epoch, (first, second) in enumerate(zip(a["epochs"], b["epochs"], strict=True)):
        assert len(first) == len(second) == len(one[epoch])
        drawn: list[int] = list(chain(*first, *second))
        if epoch == 1:
            assert set(drawn) == set(chosen)
            assert len(drawn) == 28  # one padded
        elif epoch == 2:
            assert all(index % 2 == 0 for index in drawn)
            assert (Counter(drawn) - Counter(chain(*one[epoch]))).total() == 1  # the same draws, and one padded
        else:
            assert set(drawn) == set(range(61))
    same([a["values"], a["seen"]], [b["values"], b["seen"]])


def test_ranks_with_datasets_of_different_sizes_are_refused_instead_of_hanging(script):
    for rank in of_ranks(script, "unequal_datasets"):
        assert "RefusedError: PSKD needs all ranks to train on one dataset" in rank["error"]
        assert "48, 52" in rank["error"]


def test_ranks_end_with_equal_parameters_that_training_has_changed(script):
    first: Tensor = of_ranks(script, "memory")[0]["weights"]
    assert first.isfinite().all()
    assert not torch.equal(first, of_ranks(script, "off")[0]["with"])
