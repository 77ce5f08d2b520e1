"""Checksums of tensors."""

import xxhash

__all__ = ["COPY_BYTES", "hash_name", "new_hash"]


COPY_BYTES = 4 << 20
"""Bytes that are copied at a time."""


def new_hash(data: bytes = b"") -> xxhash.xxh3_128:
    """A checksum, begun with some bytes: against damage, not against malice."""
    return xxhash.xxh3_128(data)


def hash_name(checksum: xxhash.xxh3_128) -> str:
    """A checksum as reports hold it."""
    return f"xxh3-128:{checksum.hexdigest()}"
