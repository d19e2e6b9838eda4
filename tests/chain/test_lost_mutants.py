"""Mutants of what is done about lost blocks (`golem.chain.lost`): each forgets one part of the rule, and each is caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import test_lost_blocks as blocks
import test_watch as watching
from chain_support import Lab, devchain

from golem.chain.engine import Engine
from golem.chain.evidence import View
from golem.chain.lost import Lost
from golem.chain.rows import TxRow
from golem.chain.store import Store
from golem.chain.watch import Vigil

Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.usefixtures("calm")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One chain is enough to see that tests can fail."""
    with devchain(tmp_path_factory.mktemp("chain")) as url:
        yield Lab(url, "devchain")


def never_looks(patch: Patch) -> None:
    async def nothing(*_: Any) -> tuple[list[TxRow], int]:
        return [], 0

    patch.setattr(Lost, "find", nothing)


def counts_nonces_only(patch: Patch) -> None:
    """A final block that has another hash now is not noticed."""
    find = Lost.find

    async def counted(self: Lost, views: Sequence[View]) -> tuple[list[TxRow], int]:
        lost, since = await find(self, views)
        count = max(view.count for view in views)
        return [tx for tx in lost if tx.nonce >= count], since

    patch.setattr(Lost, "find", counted)


def sends_all_again(patch: Patch) -> None:
    """What had failed goes out again like what had paid."""
    reopen = Store.reopen
    patch.setattr(Store, "reopen", lambda self, tx_id, void, since: reopen(self, tx_id, False, since))


def waits_for_nobody(patch: Patch) -> None:
    """The repeat goes out beside the empty transaction that is to keep the old one from being mined."""
    patch.setattr(Lost, "waits_for", lambda self, tx: None)


def gives_way_to_nobody(patch: Patch) -> None:
    """The old one has paid after all, and the repeat pays as well."""
    patch.setattr(Lost, "paid_by", lambda self, batch_id, tx_id=0: None)


def gives_way_always(patch: Patch) -> None:
    """Even where that leaves some unpaid."""
    patch.setattr(Lost, "unpaid", lambda self, batch_id, payer: [])


def names_nobody_paid_twice(patch: Patch) -> None:
    patch.setattr(Lost, "twice", lambda self: [])


def tells_nothing(patch: Patch) -> None:
    patch.setattr(Lost, "problem", lambda self, unnoticed: [])


def rests_when_idle(patch: Patch) -> None:
    patch.setattr(Engine, "_young", property(lambda self: False, lambda self, value: None), raising=False)


def believes_the_first_look(patch: Patch) -> None:
    patch.setattr("golem.chain.watch.PATIENT_LOOKS", 1)


def takes_silence_for_loss(patch: Patch) -> None:
    async def unsaid(*_: Any) -> bool:
        return False

    patch.setattr("golem.chain.watch._is_there", unsaid)


def watches_only_the_young(patch: Patch) -> None:
    rows = Vigil._rows
    patch.setattr(Vigil, "_rows", lambda self, where="1", *values: [] if "deep=1" in where else rows(self, where, *values))


#: mutant -> the history that shows what it does
HISTORIES: dict[Callable[[Patch], None], Callable[..., None]] = {
    never_looks: blocks.test_lost_blocks_name_the_debts_and_what_to_do,
    counts_nonces_only: blocks.test_old_bytes_that_were_mined_without_a_lower_nonce_are_noticed_by_their_block,
    sends_all_again: blocks.test_the_old_bytes_wait_in_somebodys_mempool,
    waits_for_nobody: blocks.test_the_repeat_is_not_sent_while_the_old_bytes_may_be_mined,
    gives_way_to_nobody: blocks.test_the_old_bytes_of_a_failed_payment_are_mined_after_its_debt_was_paid_anew,
    gives_way_always: blocks.test_a_repeat_that_pays_more_than_what_the_old_bytes_paid_waits_for_a_person,
    names_nobody_paid_twice: blocks.test_old_bytes_that_were_mined_without_a_lower_nonce_are_noticed_by_their_block,
    tells_nothing: blocks.test_lost_blocks_name_the_debts_and_what_to_do,
    rests_when_idle: watching.test_an_idle_payer_leaves_the_chain_alone_once_its_payment_is_deep,
    watches_only_the_young: watching.test_what_is_deep_is_left_alone_until_one_after_it_is_lost,
}


@pytest.mark.parametrize("mutant", HISTORIES, ids=lambda mutant: mutant.__name__)
def test_a_history_catches_a_mutant(lab: Lab, db: Path, monkeypatch: Patch, mutant: Callable[[Patch], None]) -> None:
    mutant(monkeypatch)
    history = HISTORIES[mutant]
    more = {"monkeypatch": monkeypatch} if "monkeypatch" in history.__wrapped__.__code__.co_varnames else {}
    with pytest.raises(AssertionError):
        history(lab=lab, db=db, **more)


@pytest.mark.parametrize("mutant", [believes_the_first_look, takes_silence_for_loss], ids=lambda mutant: mutant.__name__)
def test_a_doubtful_look_is_no_loss(lab: Lab, db: Path, monkeypatch: Patch, mutant: Callable[[Patch], None]) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        watching.test_a_payee_is_told_of_a_payment_that_the_chain_has_lost_and_when_it_is_back(lab=lab, db=db)
