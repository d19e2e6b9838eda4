"""Identity API: the identity of this node."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quart import Blueprint, Response

from golem.rest.edge import respond_json

if TYPE_CHECKING:
    from golem.node import Node


def blueprint(node: Node) -> Blueprint:
    """Return the identity API of `node`."""
    api = Blueprint("identity", __name__, url_prefix="/identity-api/v1")

    @api.get("/identities")
    @api.get("/identity/default")
    async def identities() -> Response:
        from quart import request

        default = {"identityId": node.node_id, "name": node.name, "isDefault": True, "isLocked": False}
        return respond_json(default if request.path.endswith("default") else [default])

    return api
