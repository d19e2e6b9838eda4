"""Identity API: the identity of this node."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quart import Blueprint, Response

from golem.rest.edge import respond_json

if TYPE_CHECKING:
    from golem.node.node import Node


def blueprint(node: Node) -> Blueprint:
    """Return the identity API of `node`."""
    api = Blueprint("identity", __name__, url_prefix="/identity-api/v1")

    def default() -> dict[str, object]:
        return {"identityId": node.node_id, "name": node.name, "isDefault": True, "isLocked": False}

    @api.get("/identities")
    async def identities() -> Response:
        return respond_json([default()])

    @api.get("/identity/default")
    async def default_identity() -> Response:
        return respond_json(default())

    return api
