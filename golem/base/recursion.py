"""Keeps Python's recursion limit where it protects us.

A JSON or MessagePack text nested a hundred thousand deep ends in a clean `RecursionError` under the default limit, and in
a crash of the whole process under a higher one. `py_ecc`, which web3 and the keystore library bring along, raises the
limit to 100,000 when it is imported; so it is imported here first, with that taken from it.
"""

from __future__ import annotations

import importlib
import sys


def tame_imports() -> None:
    """Import what would raise the recursion limit, without its doing so. Call before importing web3 or eth_keyfile."""
    if "py_ecc" in sys.modules:
        return
    real = sys.setrecursionlimit
    sys.setrecursionlimit = lambda limit: None
    try:
        importlib.import_module("py_ecc")
    finally:
        sys.setrecursionlimit = real
