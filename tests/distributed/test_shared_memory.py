"""The shared-memory gather between real forked processes: right rows at any pace, and nothing left behind."""

import multiprocessing
import os
import random
import time
import traceback
from multiprocessing import connection
from pathlib import Path

import pytest
import torch

from vllm_cfg_plugin.distributed import memory_slot, shared_memory
from vllm_cfg_plugin.distributed.sequence_group import MemberFailedError
from vllm_cfg_plugin.distributed.shared_memory import SharedMemoryGather, connect

TIMEOUT_S = 60
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)


def run_forked(function, ranks, *args):
    """`function(rank, ranks, share, *args)` in forked processes; their results by rank."""
    context = multiprocessing.get_context("fork")
    pipes = {(a, b): context.Pipe() for a in range(ranks) for b in range(a + 1, ranks)}
    ends = [{} for _ in range(ranks)]
    for (a, b), (first, second) in pipes.items():
        ends[a][b], ends[b][a] = first, second
    readers, writers = zip(*(context.Pipe(duplex=False) for _ in range(ranks)), strict=True)
    processes = [
        context.Process(target=_run_one, args=(function, rank, ranks, ends[rank], writers[rank], args), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT_S
    collected = {}  # read while they run: a pipe holds no large result
    while len(collected) < ranks and time.monotonic() < deadline:
        for reader in connection.wait(readers, max(0, deadline - time.monotonic())):
            value, error = reader.recv()
            assert error is None, f"rank {readers.index(reader)} raised:\n{error}"
            collected[readers.index(reader)] = value
    for process in processes:
        process.join(1)
        process.kill()
    hung = [rank for rank in range(ranks) if rank not in collected]
    assert not hung, f"ranks {hung} hang"
    return [collected[rank] for rank in range(ranks)]


def _run_one(function, rank, ranks, ends, result, args):
    torch.set_num_threads(1)

    def share(mine):
        for end in ends.values():
            end.send(mine)
        return [mine if peer == rank else ends[peer].recv() for peer in range(ranks)]

    try:
        result.send((function(rank, ranks, share, *args), None))
    except BaseException:
        result.send((None, traceback.format_exc()))


def make_row(rank, exchange, width, dtype):
    generator = torch.Generator().manual_seed(1000 * exchange + rank)
    return torch.randint(0, 2 if dtype == torch.bool else 100, (width,), generator=generator).to(dtype)


def exchange_many(rank, ranks, share, exchanges, delays):
    """Rows of random widths, growing now and then; each rank's own delays, so that any rank may be first or last."""
    gather = connect(rank, ranks, share)
    common, own = random.Random(1), random.Random(rank)
    wrong = 0
    for exchange in range(exchanges):
        width = common.randrange(1, 100 * (1 + exchange // 4))
        dtype = common.choice(DTYPES)
        if own.random() < delays:
            time.sleep(own.choice((1e-4, 5e-4, 2e-3)))
        rows = gather(make_row(rank, exchange, width, dtype))
        expected = torch.stack([make_row(peer, exchange, width, dtype) for peer in range(ranks)])
        wrong += rows.dtype != dtype or not torch.equal(rows, expected)
    gather.close()
    return wrong


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("delays", [0.0, 0.2])
def test_every_rank_gets_every_row(ranks, delays):
    assert run_forked(exchange_many, ranks, 2000, delays) == [0] * ranks


def keep_results(rank, ranks, share):
    gather = connect(rank, ranks, share)
    kept = [gather(torch.full((5,), float(10 * exchange + rank))) for exchange in range(6)]
    empty = gather(torch.empty(0))
    return [rows[:, 0].tolist() for rows in kept], tuple(empty.shape)


def test_later_exchanges_do_not_change_earlier_results():
    for kept, empty in run_forked(keep_results, 2):
        assert kept == [[10.0 * exchange, 10.0 * exchange + 1] for exchange in range(6)]
        assert empty == (2, 0)


def read_slowly(rank, ranks, share):
    """Rank 1 sees that rank 0's row is there, and copies it only after rank 0 has had time to write the next one."""
    if rank == 1:
        copy = memory_slot.Slot.read_into

        def slow_copy(*args):
            time.sleep(0.01)
            copy(*args)

        memory_slot.Slot.read_into = slow_copy
    gather = connect(rank, ranks, share)
    return [gather(torch.full((3,), exchange))[0].tolist() for exchange in range(20)]


def test_a_fast_rank_overwrites_nothing_that_is_still_read():
    """A fast rank does not overwrite what a slow one still reads."""
    expected = [[exchange] * 3 for exchange in range(20)]
    assert run_forked(read_slowly, 2) == [expected, expected]


def trade_parts(rank, ranks, share):
    gather = connect(rank, ranks, share)
    sent = torch.arange(ranks * 40_000).view(ranks, 8, -1) + 1_000_000 * rank
    return [gather.all_to_all(sent + exchange).numpy() for exchange in range(3)]


def test_every_rank_gets_its_part_of_every_rank():
    by_rank = run_forked(trade_parts, 3)
    for rank, received in enumerate(by_rank):
        for exchange, parts in enumerate(received):
            first = torch.arange(40_000).view(8, -1) + 40_000 * rank + exchange
            assert all((parts[peer] == (first + 1_000_000 * peer).numpy()).all() for peer in range(3))


def fail_once(rank, ranks, share):
    """Rank 1 can't take part in the second of three exchanges."""
    gather = connect(rank, ranks, share)
    gather(torch.tensor([rank]))
    if rank == 1:
        gather.fail()
    else:
        with pytest.raises(MemberFailedError, match="process 1 of this cfg rank failed"):
            gather.all_to_all(torch.zeros(ranks, 5))
    return gather(torch.tensor([rank])).tolist()


def test_a_rank_that_fails_leaves_no_other_waiting():
    assert run_forked(fail_once, 3) == [[[0], [1], [2]]] * 3


def trade_in_pairs(rank, ranks, share):
    """Rows of growing and shrinking sizes among ranks 0 and 1, and 2 and 3, and among all of them.

    A rank that has passed over another's large rows reads its smaller ones then, and the next ones are large again.
    """
    gather = connect(rank, ranks, share)
    pair = [rank - rank % 2, rank - rank % 2 + 1]
    found, everybody = [], []
    for exchange, width in enumerate([10, 100_000, 50_000, 3, 400_000, 60_000, 400_000, 8]):
        rows = gather(torch.full((width * (1 + rank // 2),), rank + 10 * exchange), pair)
        parts = gather.all_to_all(torch.full((2, width), rank + 10 * exchange), pair)
        found.append([row.unique().tolist() for row in (*rows, *parts)])
        for _ in range(2):  # both slots of each
            everybody = gather(torch.full((10_000 * (exchange + 1),), rank))[:, 0].tolist()
    return found, everybody


def test_some_ranks_exchange_while_others_do():
    for rank, (found, everybody) in enumerate(run_forked(trade_in_pairs, 4)):
        pair = [rank - rank % 2, rank - rank % 2 + 1]
        assert found == [[[member + 10 * exchange] for member in pair * 2] for exchange in range(8)]
        assert everybody == [0, 1, 2, 3]


def wait_long(rank, ranks, share):
    gather = connect(rank, ranks, share)
    if rank == 1:
        time.sleep(1)
    cpu = time.process_time()
    gather(torch.tensor([rank]))
    return time.process_time() - cpu


def test_a_rank_that_waits_does_not_burn_its_core():
    assert run_forked(wait_long, 2)[0] < 0.1  # of the second that it waits; spinning costs what it can get


def wrong_width(rank, ranks, share):
    gather = connect(rank, ranks, share)
    with pytest.raises(RuntimeError, match=r"another rank sent a row of \d+ bytes where this one sent \d+"):
        gather(torch.zeros(10 + 1_000_000 * rank))
    return True


def test_rows_of_different_width_are_an_error_and_not_a_crash():
    assert run_forked(wrong_width, 2) == [True, True]


def open_files():
    return sorted(os.listdir("/proc/self/fd"))


def connect_and_close(rank, ranks, share):
    before, named = open_files(), set(os.listdir("/dev/shm"))
    for _ in range(3):
        gather = connect(rank, ranks, share)
        gather(torch.zeros(100_000))
        left = [name for name in set(os.listdir("/dev/shm")) - named if "cfg" in name]
        gather.close()
        mapped = "cfg-gather" in Path("/proc/self/maps").read_text()
    return open_files() == before, left, mapped


def test_nothing_is_left_behind():
    assert run_forked(connect_and_close, 3) == [(True, [], False)] * 3


def fall_back(rank, ranks, share, reason):
    """Only rank 1 is out of reach; every rank must come to the same decision."""
    before = open_files()
    if rank == 1 and reason == "other host":
        shared_memory._host = lambda: ("another boot", "pid:[1]")
    elif rank == 1 and reason == "no memfd":
        del os.memfd_create
    elif rank == 1 and reason == "other file":
        shared_memory._identity = lambda status: (0, 0)
    elif rank == 1 and reason == "may not open":

        def refuse(*args):
            raise PermissionError("not yours")

        os.open = refuse
    gather = connect(rank, ranks, share)
    return gather is None, open_files() == before


@pytest.mark.parametrize("reason", ["other host", "no memfd", "other file", "may not open"])
def test_all_ranks_fall_back_when_one_is_out_of_reach(reason):
    assert run_forked(fall_back, 3, reason) == [(True, True)] * 3


def is_connected(rank, ranks, share):
    return isinstance(connect(rank, ranks, share), SharedMemoryGather)


def test_ranks_of_one_host_connect():
    assert run_forked(is_connected, 2) == [True, True]
