"""The one tensor in which a request's result travels from the scheduler to the front end; must not import vLLM.

vLLM carries one tensor per pooling output and nothing else, so the header (metrics, size, error) leads the pixels in
it: 4 bytes of header length, the msgpack header, then the bytes of the images or frames.
"""

from __future__ import annotations

import msgspec
import numpy as np
import torch

from vllm_cfg_plugin.engine.metrics import RequestMetrics


class ResultHeader(msgspec.Struct, kw_only=True, omit_defaults=True):
    """`error` is None for pixels of `shape`, [number, height, width, channels], else the message.

    `is_refused` is true for an error of the request's inputs.
    """

    metrics: RequestMetrics
    shape: tuple[int, ...] = ()
    error: str | None = None
    is_refused: bool = False


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ResultHeader)


def pack_result(header: ResultHeader, pixels: bytes | memoryview = b"") -> torch.Tensor:
    """One uint8 tensor [4 + header + pixels]."""
    head = _encoder.encode(header)
    buffer = np.empty(4 + len(head) + len(pixels), dtype=np.uint8)
    buffer[:4] = np.frombuffer(len(head).to_bytes(4, "little"), dtype=np.uint8)
    buffer[4 : 4 + len(head)] = np.frombuffer(head, dtype=np.uint8)
    buffer[4 + len(head) :] = np.frombuffer(pixels, dtype=np.uint8)
    return torch.from_numpy(buffer)


def unpack_result(tensor: torch.Tensor) -> tuple[ResultHeader, np.ndarray | None]:
    """The header and, unless it holds an error, the images or frames: uint8 [number, height, width, channels]."""
    raw = tensor.numpy()
    end = 4 + int.from_bytes(raw[:4].tobytes(), "little")
    header = _decoder.decode(raw[4:end].data)
    if header.error is not None:
        return header, None
    return header, raw[end:].reshape(header.shape)
