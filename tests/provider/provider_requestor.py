"""A requestor for tests of the provider agent: plain calls of the REST API, one method a step, no SDK."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
from worlds.patience import patience

PLATFORM_KEY = "golem.com.payment.chosen-platform"


class Requestor:
    """One demand at one node."""

    def __init__(self, url: str, app_key: str) -> None:
        headers = {"Authorization": f"Bearer {app_key}"}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=patience(40), trust_env=False)
        self.node_id = self.call("GET", "/me")["identity"]
        self.allocation: dict[str, Any] = {}
        self.demand: dict[str, Any] = {}
        self.demand_id = ""

    def call(self, method: str, path: str, body: Any = ..., **params: Any) -> Any:
        answer = self.http.request(method, path, params=params, **({} if body is ... else {"json": body}))
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text[:500]}"
        return answer.json() if answer.content else None

    def set_out(self, runtime: str = "wasmtime", subnet: str = "public", minutes: float = 20, **extra: Any) -> None:
        """Set money aside and publish a demand."""
        platform = self.call("GET", "/payment-api/v1/requestorAccounts")[0]["platform"]
        self.allocation = self.call("POST", "/payment-api/v1/allocations", {"totalAmount": "1", "paymentPlatform": platform})
        found = self.call("GET", "/payment-api/v1/demandDecorations", allocationIds=self.allocation["allocationId"])
        properties = {one["key"]: one["value"] for one in found["properties"]}
        constraints = [*found["constraints"], f"(golem.runtime.name={runtime})", f"(golem.node.debug.subnet={subnet})"]
        self.demand = {
            "properties": {
                **properties,
                "golem.srv.comp.expiration": int((time.time() + minutes * 60) * 1000),
                "golem.srv.caps.multi-activity": True,
                "golem.node.debug.subnet": subnet,
                "golem.com.payment.debit-notes.accept-timeout?": 120,
                **extra,
            },
            "constraints": f"(&{''.join(constraints)})",
        }
        self.demand_id = self.call("POST", "/market-api/v1/demands", self.demand)

    def next_event(self, wanted: Callable[[dict[str, Any]], bool], patience_s: float = 20) -> dict[str, Any]:
        """Return the next event of the demand that is `wanted`; others are dropped."""
        until = time.monotonic() + patience(patience_s)
        while time.monotonic() < until:
            events = self.call("GET", f"/market-api/v1/demands/{self.demand_id}/events", timeout=5, maxEvents=10)
            if found := next((event for event in events if wanted(event)), None):
                return found
        raise AssertionError("no such event in time")

    def counter(self, proposal_id: str, **extra: Any) -> str:
        """Answer a proposal with the demand and the chosen platform."""
        properties = {**self.demand["properties"], PLATFORM_KEY: self.allocation["paymentPlatform"], **extra}
        path = f"/market-api/v1/demands/{self.demand_id}/proposals/{proposal_id}"
        return str(self.call("POST", path, {**self.demand, "properties": properties}))

    def negotiate(self, **extra: Any) -> dict[str, Any]:
        """Return the provider's answer to our counter-proposal: a draft, or a rejection."""
        first = self.next_event(lambda event: event["eventType"] == "ProposalEvent" and event["proposal"]["state"] == "Initial")
        self.counter(first["proposal"]["proposalId"], **extra)
        return self.next_event(
            lambda event: event["eventType"] == "ProposalRejectedEvent" or event["proposal"]["state"] == "Draft"
        )

    def agree(self, proposal_id: str) -> str:
        """Make an agreement; return its id once it is approved."""
        valid_to = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 600))
        body = {"proposalId": proposal_id, "validTo": valid_to}
        agreement_id = str(self.call("POST", "/market-api/v1/agreements", body))
        self.call("POST", f"/market-api/v1/agreements/{agreement_id}/confirm")
        self.call("POST", f"/market-api/v1/agreements/{agreement_id}/wait", timeout=patience(20))
        return agreement_id

    def hire(self, **extra: Any) -> str:
        """From nothing to an approved agreement."""
        self.set_out(**extra)
        return self.agree(self.negotiate()["proposal"]["proposalId"])

    def start(self, agreement_id: str, timeout_s: float = 20) -> str:
        """Return the id of a new activity once its exe-unit is there."""
        asked = {"agreementId": agreement_id}
        return str(self.call("POST", "/activity-api/v1/activity", asked, timeout=patience(timeout_s))["activityId"])

    def destroy(self, activity_id: str) -> None:
        self.call("DELETE", f"/activity-api/v1/activity/{activity_id}", timeout=patience(20))

    def execute(self, activity_id: str, *commands: dict[str, Any], patience_s: float = 60) -> list[dict[str, Any]]:
        """Run a script to its end; return the results of its commands."""
        path = f"/activity-api/v1/activity/{activity_id}/exec"
        batch_id = self.call("POST", path, {"text": json.dumps(commands)})

        def ended() -> list[dict[str, Any]]:
            found = self.call("GET", f"{path}/{batch_id}", timeout=5)
            return list(found) if found and found[-1]["isBatchFinished"] else []

        return list(eventually(ended, patience_s))

    def state(self, activity_id: str) -> str:
        return str(self.call("GET", f"/activity-api/v1/activity/{activity_id}/state")["state"][0])

    def terminate(self, agreement_id: str) -> None:
        self.call("POST", f"/market-api/v1/agreements/{agreement_id}/terminate", {"message": "done"})

    def documents(self, kind: str, agreement_id: str) -> list[dict[str, Any]]:
        """Return the `debitNotes` or `invoices` of an agreement that arrived."""
        return [one for one in self.call("GET", f"/payment-api/v1/{kind}") if one["agreementId"] == agreement_id]

    def accept(self, kind: str, document: dict[str, Any]) -> None:
        amount = document.get("amount") or document["totalAmountDue"]
        body = {"totalAmountAccepted": amount, "allocationId": self.allocation["allocationId"]}
        name = "invoiceId" if kind == "invoices" else "debitNoteId"
        self.call("POST", f"/payment-api/v1/{kind}/{document[name]}/accept", body)


def eventually(look: Callable[[], Any], patience_s: float = 20, pause_s: float = 0.1) -> Any:
    """Return what `look` finds as soon as it is something; fail after `patience_s`."""
    until = time.monotonic() + patience(patience_s)
    while not (found := look()):
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(pause_s)
    return found
