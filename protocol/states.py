"""Roles, states and reasons that code compares: each word once. On a disk and on a wire each of them is its text."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """Of a node in an agreement."""

    REQUESTOR = "Requestor"
    PROVIDER = "Provider"


class Party(StrEnum):
    """Of a node in a debt."""

    PAYEE = "payee"
    PAYER = "payer"


class DocumentKind(StrEnum):
    """What a signature is given for."""

    OFFER = "offer"
    DEMAND = "demand"
    AGREEMENT = "agreement"
    APPROVAL = "approval"
    DEBIT_NOTE = "debit-note"
    INVOICE = "invoice"
    ACCEPTANCE = "acceptance"
    PAYMENT = "payment"


class SubscriptionEnd(StrEnum):
    """Why an offer or a demand is over."""

    WITHDRAWN = "withdrawn"
    EXPIRED = "expired"
    PUSHED_OUT = "pushed out"


class ProposalState(StrEnum):
    """Of a proposal, as agents see it."""

    INITIAL = "Initial"
    DRAFT = "Draft"
    REJECTED = "Rejected"
    ACCEPTED = "Accepted"


class AgreementState(StrEnum):
    """Of an agreement. Agents see `Approving` as `Pending`: it is not committed to yet."""

    PROPOSAL = "Proposal"
    PENDING = "Pending"
    APPROVING = "Approving"
    APPROVED = "Approved"
    CANCELLED = "Cancelled"
    REJECTED = "Rejected"
    EXPIRED = "Expired"
    TERMINATED = "Terminated"


class ActivityState(StrEnum):
    """Of an activity."""

    NEW = "New"
    INITIALIZED = "Initialized"
    DEPLOYED = "Deployed"
    READY = "Ready"
    UNRESPONSIVE = "Unresponsive"
    TERMINATED = "Terminated"


class ActivityEnd(StrEnum):
    """Why an activity is over, in the words that agents see."""

    DESTROYED = "destroyed"
    UNREACHABLE = "provider unreachable"
    LIMIT = "Usage limit exceeded"
    EXPIRED = "Agreement expired"
    LOST = "Runtime lost"
    DISK = "Disk full"


class DocumentStatus(StrEnum):
    """Of a debit note or an invoice."""

    ISSUED = "ISSUED"  # written by the payee, no receipt yet
    RECEIVED = "RECEIVED"  # on both nodes
    ACCEPTED = "ACCEPTED"  # the payer owes it and has ordered payment
    REJECTED = "REJECTED"
    CANCELLED = "CANCELLED"
    SETTLED = "SETTLED"  # paid, final on chain
