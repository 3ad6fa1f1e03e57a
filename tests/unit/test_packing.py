"""Packed rows: layout, padding and windows."""

from dataclasses import dataclass

import pytest
import torch

from vllm_cfg_plugin.distributed.sequence_group import together
from vllm_cfg_plugin.pipelines.common.packing import (
    ROW_MULTIPLE,
    LayoutCache,
    PackedRows,
    common_runs,
    interleave,
    pad_rows,
    padding_rows,
)

CPU = torch.device("cpu")
MIXES = [(5,), (1,), (16,), (4, 4, 4), (1, 7, 7, 2), (16, 16), (3, 0, 2), (3, 2, 0), (3, 200, 200, 200, 1, 1)]


@pytest.mark.parametrize(
    ("rows", "padding"),
    [(1, 15), (15, 1), (16, 0), (17, 15), (32, 0), (0, 16), (256, 0), (257, 15), (513, 31), (1088, 0), (1089, 63)],
)
def test_padding_rows(rows, padding):
    assert padding_rows(rows) == padding


def test_a_stream_has_one_of_few_sizes_and_little_padding():
    sizes = {rows + padding_rows(rows) for rows in range(1, 2**15)}
    assert len(sizes) <= 16 * 8
    assert all(size % ROW_MULTIPLE == 0 for size in sizes)
    assert all(padding_rows(rows) <= rows / 16 for rows in range(257, 2**15))


def test_pad_rows_keeps_rows_and_adds_zeros():
    rows = torch.randn(5, 3)
    padded = pad_rows(rows)
    assert padded.shape == (ROW_MULTIPLE, 3)
    assert torch.equal(padded[:5], rows)
    assert not padded[5:].any()


def test_pad_rows_of_a_vector():
    assert pad_rows(torch.ones(3)).tolist() == [1] * 3 + [0] * 13


def test_cu_seqlens_and_runs():
    packed = PackedRows((4, 7, 7, 2), CPU)
    assert packed.cu_seqlens.tolist() == [0, 4, 11, 18, 20]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 7
    runs = [run for (run,) in common_runs(packed)]
    assert [(run.count, run.length) for run in runs] == [(1, 4), (2, 7), (1, 2)]
    assert [(run.rows.start, run.rows.stop) for run in runs] == [(0, 4), (4, 18), (18, 20)]


def test_common_runs_are_equal_in_every_stream():
    videos, texts = PackedRows((4, 4, 4, 9), CPU), PackedRows((3, 3, 2, 2), CPU)
    runs = common_runs(videos, texts)
    assert [(video.count, video.length, text.length) for video, text in runs] == [(2, 4, 3), (1, 4, 2), (1, 9, 2)]
    assert [(video.rows.start, video.rows.stop) for video, _ in runs] == [(0, 8), (8, 12), (12, 21)]
    assert [(text.rows.start, text.rows.stop) for _, text in runs] == [(0, 6), (6, 8), (8, 10)]
    for number in (0, 1):
        assert [run[number].sequences for run in runs] == [slice(0, 2), slice(2, 3), slice(3, 4)]


def test_streams_that_do_not_belong_together_are_an_error():
    one, two = PackedRows((3,), CPU), PackedRows((3, 3), CPU)
    with pytest.raises(ValueError, match="than argument 1"):
        common_runs(two, one)
    with pytest.raises(ValueError, match="than argument 1"):
        interleave(one, two, [torch.zeros(16), torch.zeros(16)])
    with pytest.raises(ValueError, match="than argument 1"):
        interleave(one, one, [torch.zeros(16)])


@pytest.mark.parametrize("lengths", MIXES)
def test_join_then_split_is_identity(lengths):
    packed = PackedRows(lengths, CPU)
    sequences = [torch.randn(length, 3) for length in lengths]
    stream = packed.join(sequences)
    assert stream.shape[0] % ROW_MULTIPLE == 0
    assert stream.shape[0] == sum(packed.sizes)
    for piece, sequence in zip(packed.split(stream), sequences, strict=True):
        assert torch.equal(piece, sequence)


@pytest.mark.parametrize("lengths", MIXES)
def test_cuts_cover_every_row_and_the_padding_once(lengths):
    packed = PackedRows(lengths, CPU)
    rows = torch.arange(sum(packed.sizes))
    firsts = [0, *range(1, len(lengths), 2)]
    pieces = [rows[cut] for cut in packed.cut(firsts)]
    assert torch.equal(torch.cat(pieces), rows)
    assert [piece[0].item() for piece in pieces] == [sum(lengths[:first]) for first in firsts]


def test_interleave_puts_the_two_rows_of_a_sequence_together():
    text, image = PackedRows((1, 2), CPU), PackedRows((3, 1), CPU)
    texts = text.join([torch.full((1, 1), 10.0), torch.full((2, 1), 11.0)])
    images = image.join([torch.full((3, 1), 20.0), torch.full((1, 1), 21.0)])
    joint = interleave(text, image, (texts, images, -texts, -images))
    assert joint.shape == (2, 32, 1)
    assert joint[0, :7, 0].tolist() == [10, 20, 20, 20, 11, 11, 21]
    assert not joint[:, 7:].any()
    assert torch.equal(joint[1], -joint[0])


@dataclass(frozen=True)
class Place:
    """A rank of a sequence group that trades nothing."""

    rank: int
    size: int

    def any(self, flags):
        return [*flags]


def test_windows_are_the_whole_stream_and_its_padding():
    stream = torch.randn(70, 2)
    windows = [PackedRows((40, 30), CPU, Place(rank, 4)) for rank in range(4)]
    assert {rows.window_size for rows in windows} == {32}
    assert windows[0].sizes == [40, 30, 4 * 32 - 70]
    padded = torch.cat([rows.window(stream) for rows in windows])
    assert torch.equal(padded[:70], stream)
    assert torch.equal(padded[70:], torch.zeros(58, 2))
    joined = windows[1].join(windows[1].split(stream))
    assert torch.equal(joined, padded)
    assert torch.equal(windows[1].window(joined), padded[32:64])


def test_rows_of_the_stream_in_a_window():
    second = PackedRows((40, 30), CPU, Place(1, 4))  # of rows 32 to 63
    assert [second.window_of(slice(*rows)) for rows in ((0, 40), (40, None), (40, 50))] == [
        slice(0, 8),
        slice(8, 32),
        slice(8, 18),
    ]
    outside = second.window_of(slice(0, 30))
    assert outside.start >= outside.stop


def test_layouts_are_remembered_for_each_group():
    cache = LayoutCache()
    alone = cache.get("key", object)
    with together(Place(0, 2)):
        assert cache.get("key", object) is not alone
    assert cache.get("key", object) is alone
