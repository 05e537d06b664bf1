"""Seeds that are made of what they stand for."""

import hashlib


def seed_of(*parts: object) -> int:
    """A number below 2^62 made of some values: a seed that differs wherever one of them does."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
