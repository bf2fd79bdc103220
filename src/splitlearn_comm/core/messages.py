"""The key/value cache on the wire, the same in requests and responses, at both ends."""

from __future__ import annotations

from collections.abc import Iterable

from splitlearn_comm.core.codec import TensorCodec
from splitlearn_comm.core.compute_function import KeyValues
from splitlearn_comm.protocol import compute_pb2


def decode_cache(
    entries: Iterable[compute_pb2.KVCacheEntry], codec: TensorCodec
) -> KeyValues | None:
    """Return the (key, value) pairs, or None if there are none."""
    pairs = tuple(
        (
            codec.decode(entry.key_data, entry.key_shape),
            codec.decode(entry.value_data, entry.value_shape),
        )
        for entry in entries
    )
    return pairs or None


def encode_cache(present: KeyValues, codec: TensorCodec) -> list[compute_pb2.KVCacheEntry]:
    """Return one entry a layer."""
    entries = []
    for key, value in present:
        key_data, key_shape = codec.encode(key)
        value_data, value_shape = codec.encode(value)
        entries.append(
            compute_pb2.KVCacheEntry(
                key_data=key_data,
                key_shape=key_shape,
                value_data=value_data,
                value_shape=value_shape,
            )
        )
    return entries
