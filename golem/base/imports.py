"""Tames `py_ecc`, which web3 and the keystore library bring along (nothing of ours uses its curves).

When it is imported it does two things that harm a node:

- It raises Python's recursion limit to 100,000. A JSON or MessagePack text nested a hundred thousand deep ends in a clean
  `RecursionError` under the default limit, and in a crash of the whole process under a higher one.
- It computes tables of the BLS12-381 pairing, which is half of the time that web3 takes to import. They are computed when
  somebody first asks for a pairing. (No lazy import of a library serves: py_ecc's packages take the functions by name.)
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

PAIRINGS = ("py_ecc.bls12_381.bls12_381_pairing", "py_ecc.optimized_bls12_381.optimized_pairing")
FUNCTIONS = ("final_exponentiate", "pairing")  # all that their packages take from them
_loading = threading.RLock()


def tame_imports() -> None:
    """Import py_ecc harmlessly. Call before importing web3, eth or eth_keyfile."""
    if "py_ecc" in sys.modules:
        return
    for name in PAIRINGS:
        sys.modules[name] = _deferred(name)
    real = sys.setrecursionlimit
    sys.setrecursionlimit = lambda limit: None
    try:
        importlib.import_module("py_ecc")
    finally:
        sys.setrecursionlimit = real


def _deferred(name: str) -> ModuleType:
    """Return a stand-in for a module, whose functions import the real one when they are first called."""
    stand_in = ModuleType(name)

    def of_the_real_one(function: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with _loading:
                if sys.modules.get(name) is stand_in:
                    del sys.modules[name]
                module = importlib.import_module(name)
            return getattr(module, function)(*args)

        return call

    for function in FUNCTIONS:
        setattr(stand_in, function, of_the_real_one(function))
    return stand_in
