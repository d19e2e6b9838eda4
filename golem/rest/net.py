"""Net API: the state of the network. (Virtual networks are not served yet: their endpoints answer 404 with a message.)"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quart import Blueprint, Response

from golem.rest.edge import respond_json

if TYPE_CHECKING:
    from golem.node.node import Node


def blueprint(node: Node) -> Blueprint:
    """Return the net API of `node`."""
    api = Blueprint("net", __name__, url_prefix="/net-api")

    @api.get("/v2/net/status")
    @api.get("/v1/status")
    async def status() -> Response:
        addresses = node.network.addresses
        listen = addresses[0].split("/")[2] if addresses else None
        sessions = len(node.network.sessions())
        return respond_json({"nodeId": node.node_id, "listenIp": listen, "publicIp": None, "sessions": sessions})

    return api
