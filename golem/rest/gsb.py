"""`/gsb-api/v1`: services by which agents serve files themselves, over a websocket each (see `golem/files/agents.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quart import Blueprint, Response, websocket

from golem.files.agents import Service, ServiceRefused
from golem.rest.edge import ApiError, caller, created, member, null, object_body
from golem.rest.sockets import close_websocket

if TYPE_CHECKING:
    from golem.node.node import Node

PROTOCOL = "gsb+flexbuffers"
MAX_ADDRESS = 1024


class _Socket:
    """The websocket at hand as a `golem.files.agents.Connection`; kept, because the handler's tasks share it."""

    def __init__(self) -> None:
        self._socket = websocket._get_current_object()  # type: ignore[attr-defined]

    async def send(self, frame: bytes) -> None:
        await self._socket.send(frame)

    async def receive(self) -> bytes | str | None:
        message: bytes | str | None = await self._socket.receive()
        return message


def blueprint(node: Node) -> Blueprint:
    """Return the endpoints."""
    api = Blueprint("gsb", __name__, url_prefix="/gsb-api/v1")

    def find(service_id: str) -> Service:
        found = node.services.find(service_id, caller().name)
        if found is None:
            raise ApiError(404, f"no such service: {service_id[:200]}")
        return found

    @api.post("/services")
    async def bind() -> Response:
        listen = member(await object_body(), "listen", dict)
        on, components = member(listen, "on", str), member(listen, "components", list)
        if len(on) > MAX_ADDRESS or len(components) > 16 or not all(isinstance(one, str) for one in components):
            raise ApiError(400, 'field `listen`: expected {"on": text, "components": [text, ..]}')
        try:
            service = node.services.open(on, components, caller().name)
        except ServiceRefused as refused:
            raise ApiError(400, str(refused)) from None
        response = created({"listen": {"on": service.on, "components": list(service.components)}, "servicesId": service.id})
        response.headers["Location"] = f"/{service.id}"
        return response

    @api.delete("/services/<service_id>")
    async def unbind(service_id: str) -> Response:
        node.services.close(find(service_id))
        return null()

    @api.websocket("/services/<service_id>")
    async def attach(service_id: str) -> None:
        service = find(service_id)
        wanted = websocket.requested_subprotocols
        if wanted and PROTOCOL not in wanted:
            raise ApiError(400, f"expected the sub-protocol {PROTOCOL}")
        await websocket.accept(subprotocol=PROTOCOL if wanted else None)
        code, reason = await service.conversation.serve(_Socket())
        await close_websocket(code, reason)

    return api
