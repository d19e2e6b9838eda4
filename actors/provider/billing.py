"""What the provider agent asks for: debit notes while an activity runs and at its end, one invoice when all is over.

A note carries the running total of its activity; totals never decrease. The amount is in the note's row before anybody
hears of it, so that a note or invoice that has to be issued again is the same one. A note falls due each interval, with the
same total, too: a requestor that accepts it is still there. None falls due while the exe-unit is being stopped: the last
note follows at once, and would say the same again.

    note     Issuing -> Sending -> Sent -> Accepted -> Settled        (or Failed, Rejected, Cancelled)
    invoice  Issuing -> Sending -> Sent -> Accepted -> Settled        (or Failed, Rejected, Cancelled)
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from msgspec.structs import replace

from actors.provider import credit
from actors.provider.agreements import all_closed, end_agreement, next_note_at
from actors.provider.rows import (
    BillState,
    DealState,
    DocumentRow,
    EndCode,
    NoteRow,
    ProviderActivityRow,
    ProviderAgreementRow,
    UnitState,
)
from actors.provider.turn import DAY_S, Turn
from protocol.amounts import cost, sum_of
from protocol.payment_terms import LEAST_PAYMENT_GLM
from protocol.provider import (
    ActivityClosed,
    DeadlineDue,
    EventArrived,
    ForgetDue,
    InvoiceIssued,
    InvoiceSent,
    IssueNote,
    NoteDue,
    NoteIssued,
    NoteRead,
    NoteSent,
    ReadNote,
    ReadUsage,
    SendInvoice,
    SendNote,
    UsageRead,
    WriteInvoice,
)
from protocol.states import DocumentStatus

FINAL_NOTE_S = 7 * DAY_S  # how long the last note of an activity is offered to a requestor that is away
SENDING_S = 60.0  # beyond the time to accept: as long as a note may be on its way while its receipt is awaited
ACCEPT, PAY = "accept", "pay"
BILLED_BY_INTERVAL = (UnitState.STARTING, UnitState.RUNNING)
_STATUS: dict[str, BillState] = {
    DocumentStatus.ACCEPTED: BillState.ACCEPTED,
    DocumentStatus.SETTLED: BillState.SETTLED,
    DocumentStatus.REJECTED: BillState.REJECTED,
    DocumentStatus.CANCELLED: BillState.CANCELLED,
}
_EVENT = {
    "AcceptedEvent": BillState.ACCEPTED,
    "SettledEvent": BillState.SETTLED,
    "RejectedEvent": BillState.REJECTED,
    "CancelledEvent": BillState.CANCELLED,
}


# -- debit notes
def note_due(turn: Turn, message: NoteDue) -> None:
    """It is time for a debit note: ask for the usage, unless the last note is still on its way to the node."""
    activity = turn.activity(message.activity_id)
    row = turn.agreement(activity.agreement_id) if activity else None
    if activity is None or row is None or activity.state not in BILLED_BY_INTERVAL:
        return
    if turn.now - activity.billed_at > row.interval_s + max(_accept_s(turn, row), SENDING_S):
        end_agreement(turn, row, EndCode.NOT_ISSUED)  # whatever the cause: work that is not billed is work for nothing
        return
    credit.prove(turn, row)
    turn.wake(f"note/{activity.activity_id}", next_note_at(turn, row), message)
    if not activity.issuing:
        turn.rest(ReadUsage(activity.activity_id))


def _accept_s(turn: Turn, row: ProviderAgreementRow) -> float:
    """How long the requestor may take to accept a note: as agreed, else what we would have asked for."""
    return float(turn.config.terms.accept_timeout_s) if row.accept_timeout_s is None else row.accept_timeout_s


def usage_read(turn: Turn, message: UsageRead) -> None:
    """Make a debit note of the usage of a running activity."""
    activity = turn.activity(message.activity_id)
    if activity is None or activity.state not in BILLED_BY_INTERVAL or activity.issuing:
        return
    row = _agreement(turn, activity)
    if message.usage is not None and (usage := _merged(row, activity, message.usage)) is not None:
        _make_note(turn, row, replace(activity, usage=usage), final=False)


def activity_closed(turn: Turn, message: ActivityClosed) -> None:
    """The activity's last usage is known: make its last debit note (after the one that is being issued, if any)."""
    activity = turn.activity(message.activity_id)
    if activity is None or activity.state != UnitState.EXITED:
        return
    row = _agreement(turn, activity)
    usage = _merged(row, activity, message.usage or ()) or activity.usage or _merged(row, activity, ()) or ()
    activity = replace(activity, state=UnitState.BILLING, usage=usage)
    if activity.issuing:
        turn.save(activity)
    else:
        _make_note(turn, row, activity, final=True)


def _agreement(turn: Turn, activity: ProviderActivityRow) -> ProviderAgreementRow:
    row = turn.agreement(activity.agreement_id)
    assert row is not None, "an activity's agreement is kept as long as the activity"
    return row


def _merged(row: ProviderAgreementRow, activity: ProviderActivityRow, usage: Sequence[float]) -> tuple[float, ...] | None:
    """Return each counter's highest value so far (no report: zeros); None where the vector is not the agreed one."""
    counters = len(row.coeffs) - 1
    before = activity.usage or (0.0,) * counters
    if not usage:
        return before
    if len(usage) != counters:
        return None
    return tuple(max(float(new), old) for new, old in zip(usage, before, strict=True))


def _make_note(turn: Turn, row: ProviderAgreementRow, activity: ProviderActivityRow, *, final: bool) -> None:
    amount = max(cost(row.coeffs, activity.usage), activity.amount, key=Decimal)
    due_at = None
    if row.payment_timeout_s is not None and (final or turn.now >= row.payable_at + row.payment_timeout_s):
        due_at = turn.now + row.payment_timeout_s
        turn.save(replace(row, payable_at=turn.now))
    number = activity.notes + 1
    note = NoteRow(
        activity.activity_id, number, amount, activity.usage, due_at, BillState.ISSUING, activity.last_note_id, final=final
    )
    turn.save(note)
    turn.save(replace(activity, amount=amount, notes=number, issuing=True, counted_at=turn.now))
    credit.watch(turn, row.requestor)
    issue_note(turn, row, note)


def issue_note(turn: Turn, row: ProviderAgreementRow, note: NoteRow) -> None:
    """Have a note issued that is in its row."""
    usage, instance = list(note.usage), turn.config.instance
    turn.rest(IssueNote(note.activity_id, note.number, note.amount, usage, note.due_at, note.previous_id, row.at, instance))


def note_issued(turn: Turn, message: NoteIssued) -> None:
    """The node has a note: send it, and from now on its deadlines count. If it refuses one, the agreement ends.

    They are not counted from the receipt: who accepts before it acknowledges, or never does, owes all the same.
    """
    note, activity = turn.note(message.activity_id, message.number), turn.activity(message.activity_id)
    if note is None or activity is None or note.state != BillState.ISSUING:
        return
    row = _agreement(turn, activity)
    if message.error:
        turn.save(replace(note, state=BillState.FAILED))
    else:
        note = replace(note, state=BillState.SENDING, note_id=message.note_id, issued_at=turn.now)
        activity = replace(activity, last_note_id=message.note_id, billed_at=turn.now)
        turn.save(note)
        turn.put(f"document/{note.note_id}", DocumentRow(note.activity_id, note.number))
        send_note(turn, row, note)
        if row.accept_timeout_s is not None:
            _arm(turn, note, ACCEPT, turn.now + row.accept_timeout_s + SENDING_S)
        if note.due_at is not None:
            _arm(turn, note, PAY, note.due_at)
    activity = replace(activity, issuing=False, state=UnitState.CLOSED if note.final else activity.state)
    turn.save(activity)
    if message.error:
        end_agreement(turn, row, EndCode.NOT_ISSUED)
    if note.final:
        bill_if_done(turn, row.agreement_id)
    elif activity.state == UnitState.BILLING:
        _make_note(turn, row, activity, final=True)


def send_note(turn: Turn, row: ProviderAgreementRow, note: NoteRow) -> None:
    give_up_s = row.accept_timeout_s if not note.final and row.accept_timeout_s is not None else FINAL_NOTE_S
    turn.rest(SendNote(note.activity_id, note.number, note.note_id, note.issued_at + give_up_s))


def note_sent(turn: Turn, message: NoteSent) -> None:
    """The requestor has a note, and its time to accept it. Or it cannot be reached: no more work for it."""
    note, activity = turn.note(message.activity_id, message.number), turn.activity(message.activity_id)
    if note is None or activity is None or note.state != BillState.SENDING:
        return
    row = _agreement(turn, activity)
    if not message.sent:
        turn.save(replace(note, state=BillState.FAILED))
        if message.most:
            _correct(turn, row, activity, note, message.most)
        else:
            end_agreement(turn, row, EndCode.UNREACHABLE)
        return
    turn.save(replace(note, state=BillState.SENT))
    if row.accept_timeout_s is not None:
        _arm(turn, note, ACCEPT, turn.now + row.accept_timeout_s)


def _correct(turn: Turn, row: ProviderAgreementRow, activity: ProviderActivityRow, note: NoteRow, most: str) -> None:
    """Ask once for the highest amount that the requestor's node would take; two clocks may differ a little."""
    if note.corrected or note.number != activity.notes or Decimal(most) >= Decimal(note.amount):
        end_agreement(turn, row, EndCode.NOTE_REJECTED)
        return
    number = activity.notes + 1
    again = replace(
        note,
        number=number,
        amount=most,
        state=BillState.ISSUING,
        previous_id=note.note_id,
        note_id="",
        issued_at=0.0,
        corrected=True,
    )
    turn.save(again)
    turn.save(replace(activity, amount=most, notes=number, issuing=True))
    issue_note(turn, row, again)


def _arm(turn: Turn, note: NoteRow, deadline: str, at: float) -> None:
    turn.wake(_deadline_key(note, deadline), at, DeadlineDue(note.activity_id, note.number, deadline))


def _deadline_key(note: NoteRow, deadline: str) -> str:
    return f"{deadline}/{note.activity_id}/{note.number}"


def deadline_due(turn: Turn, message: DeadlineDue) -> None:
    """A deadline has come: ask the node before anything is done about it, events may be late."""
    note, activity = turn.note(message.activity_id, message.number), turn.activity(message.activity_id)
    if note is None or activity is None or _agreement(turn, activity).state != DealState.APPROVED:
        return
    if note.state in (
        (BillState.SENDING, BillState.SENT)
        if message.deadline == ACCEPT
        else (BillState.SENDING, BillState.SENT, BillState.ACCEPTED)
    ):
        turn.rest(ReadNote(note.activity_id, note.number, note.note_id, message.deadline))


def note_read(turn: Turn, message: NoteRead) -> None:
    """The status of a note at its deadline."""
    note, activity = turn.note(message.activity_id, message.number), turn.activity(message.activity_id)
    if note is None or activity is None:
        return
    row = _agreement(turn, activity)
    state = _STATUS.get(message.status, note.state)
    _note_state(turn, note, state)
    if message.deadline == ACCEPT and state not in (BillState.ACCEPTED, BillState.SETTLED):
        end_agreement(turn, row, EndCode.DEADLINE)
    elif message.deadline == PAY and state != BillState.SETTLED and not _is_dust(turn, note, state):
        end_agreement(turn, row, EndCode.NOT_PAID)


def _is_dust(turn: Turn, note: NoteRow, state: str) -> bool:
    """Return whether so little is unpaid that a transfer is not worth its gas: an accepted note of it is good enough."""
    activity = turn.activity(note.activity_id)
    paid = Decimal(activity.paid if activity else "0")
    return state == BillState.ACCEPTED and Decimal(note.amount) - paid < Decimal(LEAST_PAYMENT_GLM)


def _note_state(turn: Turn, note: NoteRow, state: str) -> None:
    if note.state != BillState.SETTLED and state != note.state:
        turn.save(replace(note, state=state))
        turn.unwake(_deadline_key(note, ACCEPT))
        if state != BillState.ACCEPTED:
            turn.unwake(_deadline_key(note, PAY))
        if state == BillState.SETTLED and (activity := turn.activity(note.activity_id)) is not None:
            credit.settled(turn, _agreement(turn, activity), activity, note.amount)


# -- the invoice
def bill_if_done(turn: Turn, agreement_id: str) -> None:
    """Issue the invoice of an agreement that is over as soon as every activity has its last note. Zero is billed too."""
    row = turn.agreement(agreement_id)
    if row is None or row.state != DealState.ENDED or row.invoice or not all_closed(turn, row):
        return
    due_s = turn.config.invoice_due_s if row.payment_timeout_s is None else row.payment_timeout_s
    amount = sum_of([one.amount for one in turn.activities(row)])
    row = replace(row, invoice=BillState.ISSUING, amount=amount, invoice_due_at=turn.now + due_s)
    turn.save(row)
    issue_invoice(turn, row)


def issue_invoice(turn: Turn, row: ProviderAgreementRow) -> None:
    """Have the invoice issued that is in the agreement's row."""
    turn.rest(
        WriteInvoice(
            row.agreement_id, row.activities, row.amount, row.invoice_due_at, row.at, turn.config.instance, row.refused_id
        )
    )


def invoice_issued(turn: Turn, message: InvoiceIssued) -> None:
    row = turn.agreement(message.agreement_id)
    if row is None or row.invoice != BillState.ISSUING:
        return
    if message.error:
        _billed(turn, row, BillState.FAILED)
        return
    turn.save(replace(row, invoice=BillState.SENDING, invoice_id=message.invoice_id))
    turn.put(f"document/{message.invoice_id}", DocumentRow(row.agreement_id, 0))
    turn.rest(SendInvoice(row.agreement_id, message.invoice_id))


def invoice_sent(turn: Turn, message: InvoiceSent) -> None:
    row = turn.agreement(message.agreement_id)
    if row is None or row.invoice != BillState.SENDING:
        return
    if message.most and not row.refused_id and Decimal(message.most) < Decimal(row.amount):
        row = replace(row, invoice=BillState.ISSUING, amount=message.most, refused_id=row.invoice_id)
        turn.save(row)
        issue_invoice(turn, row)
        return
    _billed(turn, row, BillState.FAILED if message.error else BillState.SENT)


def _billed(turn: Turn, row: ProviderAgreementRow, state: str) -> None:
    """Nothing is left to do for an agreement but to hear what becomes of its invoice."""
    turn.save(replace(row, invoice=state, document=""))
    turn.wake(f"forget/{row.agreement_id}", turn.now + turn.config.keep_s, ForgetDue(row.agreement_id))


# -- events of the feeds `debit-notes` and `invoices`
def document_event(turn: Turn, event: EventArrived) -> None:
    """What the requestor did with a note or invoice."""
    state = next((state for tail, state in _EVENT.items() if event.kind.endswith(tail)), None)
    document: DocumentRow | None = turn.get(f"document/{event.subject}")
    if state is None or document is None:
        return
    if document.number == 0:
        row = turn.agreement(document.owner)
        if row is not None and row.invoice != BillState.SETTLED:
            turn.save(replace(row, invoice=state))
            if state == BillState.SETTLED:
                credit.settled(turn, row, None, row.amount)
        return
    note, activity = turn.note(document.owner, document.number), turn.activity(document.owner)
    if note is None or activity is None:
        return
    _note_state(turn, note, state)
    if state == BillState.REJECTED:
        end_agreement(turn, _agreement(turn, activity), EndCode.NOTE_REJECTED)
    elif state == BillState.CANCELLED:
        end_agreement(turn, _agreement(turn, activity), EndCode.NOTE_CANCELLED)


def forget(turn: Turn, message: ForgetDue) -> None:
    """Delete all that is left of an agreement."""
    row = turn.agreement(message.agreement_id)
    if row is None:
        return
    if credit.debt_of(turn, row) > 0 and turn.now - row.at < turn.config.remember_debts_s:
        turn.wake(f"forget/{row.agreement_id}", turn.now + turn.config.keep_s, message)
        return
    turn.put(f"debt/{row.requestor}/{row.agreement_id}", None)
    turn.put(f"funds/{row.requestor}", None)
    for activity in turn.activities(row):
        for key, note in list(turn.prefix(f"note/{activity.activity_id}/")):
            turn.put(key, None)
            turn.put(f"document/{note.note_id}", None)
        turn.put(f"activity/{activity.activity_id}", None)
    for document_id in filter(None, (row.invoice_id, row.refused_id)):
        turn.put(f"document/{document_id}", None)
    turn.put(f"agreement/{row.agreement_id}", None)
