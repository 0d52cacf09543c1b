"""Shamir's secret sharing of 32-byte keys: any t of the shares give the secret, fewer than t tell nothing of it.

Shamir, How to share a secret, 1979. The field is that of the integers mod 2^256 + 297, the first prime past 32 bytes.
The public packages share 16 bytes only (pycryptodome) or draw their own randomness, which a simulation must give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fedloom.errors import RunError

PRIME = 2**256 + 297
SECRET, SHARE = 32, 33  # bytes

Entropy = Callable[[int], bytes]  # so many random bytes, as `os.urandom` gives them


def split(secret: bytes, holders: Sequence[int], t: int, entropy: Entropy) -> dict[int, bytes]:
    """A share for each holder (a number from 0 on): the value at holder + 1 of a random polynomial of degree t - 1."""
    if len(secret) != SECRET or not 1 <= t <= len(holders) or min(holders) < 0:
        raise RunError(f"cannot split {len(secret)} bytes into {len(holders)} shares of which {t} suffice")
    # Eight bytes more than the field has: the draw is uniform but for 2^-64.
    drawn = (int.from_bytes(entropy(SHARE + 8), "big") % PRIME for _ in range(t - 1))
    polynomial = [int.from_bytes(secret, "big"), *drawn]
    shares = {}
    for holder in holders:
        value = 0
        for coefficient in reversed(polynomial):
            value = (value * (holder + 1) + coefficient) % PRIME
        shares[holder] = value.to_bytes(SHARE, "big")
    return shares


class Interpolation:
    """Takes secrets back together from the shares of the same holders, as many as are needed."""

    def __init__(self, holders: Sequence[int]) -> None:
        points = [holder + 1 for holder in holders]
        self.at_zero = {}  # Lagrange's weights
        for holder, x in zip(holders, points, strict=True):
            above = below = 1
            for other in points:
                if other != x:
                    above, below = above * other % PRIME, below * (other - x) % PRIME
            self.at_zero[holder] = above * pow(below, -1, PRIME) % PRIME

    def secret(self, shares: Mapping[int, bytes]) -> bytes:
        """The secret; with shares of too few holders, or with a wrong one, other bytes or RunError."""
        value = sum(weight * int.from_bytes(shares[holder], "big") for holder, weight in self.at_zero.items()) % PRIME
        if value >> (8 * SECRET):
            raise RunError("the shares of a key do not fit together: one of them is wrong")
        return value.to_bytes(SECRET, "big")
