"""Exact sums of money: amounts are decimal text, and no step of a sum rounds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import ROUND_DOWN, Context, Decimal, Inexact

from protocol.types import WEI_DIGITS, amount_text

_EXACT = Context(prec=120, traps=[Inexact])
_LONG = Context(prec=400)  # products of prices and counters, before they are cut
_WEI = Decimal(1).scaleb(-WEI_DIGITS)


def total_of(amounts: Iterable[str | Decimal]) -> Decimal:
    """Return the exact sum."""
    result = Decimal(0)
    for value in amounts:
        result = _EXACT.add(result, Decimal(value))
    return result


def minus(left: str | Decimal, right: str | Decimal) -> Decimal:
    """Return the exact difference."""
    return _EXACT.subtract(Decimal(left), Decimal(right))


def sum_of(amounts: Sequence[str]) -> str:
    """Return the exact sum of amounts, as text."""
    total = Decimal(0)
    for one in amounts:
        total = _LONG.add(total, Decimal(one))
    return amount_text(total)


def cost(coeffs: Sequence[float], usage: Sequence[float]) -> str:
    """Return the amount of a usage vector: sum of coefficient times usage, plus the last coefficient.

    Exact in the decimal notation of the numbers (as everybody reads them in the offer), cut to 18 places: never more
    than anybody who checks it comes to. Raises `ValueError` where the lengths do not fit.
    """
    if len(coeffs) != len(usage) + 1:
        raise ValueError(f"{len(usage)} usage counters do not fit {len(coeffs)} coefficients")
    total = Decimal(repr(coeffs[-1]))
    for coeff, value in zip(coeffs, usage, strict=False):
        total = _LONG.add(total, _LONG.multiply(Decimal(repr(coeff)), Decimal(repr(value))))
    return amount_text(total.quantize(_WEI, ROUND_DOWN, _LONG))
