"""The HTTP application: authentication, CORS, errors, the root endpoints and the modules of each API."""

from __future__ import annotations

import logging
import secrets
from functools import partial
from typing import TYPE_CHECKING

from quart import Request, Response, Websocket, g, has_websocket_context, request, websocket
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from actors.kernel.machine import Busy
from actors.kernel.records import RowDamaged
from golem.base.hosts import is_of_this_machine
from golem.config import VERSION
from golem.node.metrics import load_prometheus
from golem.rest.edge import BODY_LIMIT, ApiError, Caller, caller, respond_json
from golem.rest.repeatable import Unheard
from golem.rest.revocation import Revocable, key_in
from protocol.types import timestamp_text

if TYPE_CHECKING:
    from golem.node.node import Node

log = logging.getLogger("golem.rest")

OPEN_PATHS = ("/metrics-api", "/version/get", "/dashboard", "/v1/image/", "/image.")  # the last two: golem.rest.registry
OWN_PATHS = ("/me", "/healthcheck")  # about the key and the process, not about an identity's objects
CORS_MAX_AGE_S = 3600


def create_app(node: Node) -> QuartTrio:
    """Return the REST application of `node`."""
    app = QuartTrio("golem", static_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=BODY_LIMIT, RESPONSE_TIMEOUT=None, BODY_TIMEOUT=60, PROVIDE_AUTOMATIC_OPTIONS=False)
    app.url_map.merge_slashes = False
    app.url_map.strict_slashes = False
    _authenticate(app, node)
    _cors(app, node)
    _errors(app)
    _root(app, node)
    from golem.rest import activity, gsb, identity, interaction, market, net, payment, registry
    from golem.rest.proxy import Proxy

    for module in (market, activity, interaction, payment, gsb, net, identity, registry):
        app.register_blueprint(module.blueprint(node))
    inner = Proxy(node, Unheard(node, app.asgi_app), partial(admit, node))
    app.asgi_app = Revocable(node.app_keys, inner)  # type: ignore[method-assign,assignment]
    return app


def _authenticate(app: QuartTrio, node: Node) -> None:
    @app.before_request
    async def check_key() -> Response | None:
        g.trace = secrets.token_hex(6)
        if request.path.startswith(OPEN_PATHS):
            return _not_for_pages(node)
        if request.method == "OPTIONS" and _origin_known(node, request.headers.get("Origin", "")):
            return Response(b"", status=200)
        return _refusal(node, request)

    @app.before_websocket
    async def check_websocket_key() -> Response | None:
        g.trace = secrets.token_hex(6)
        return _refusal(node, websocket)


def _not_for_pages(node: Node) -> Response | None:
    """Return the answer to a page of some website: what needs no key is not for it, nor the places of downloads.

    Browsers say where a page comes from (`Origin`, `Sec-Fetch-Site`). One whose name has been made to lead here is told by
    the name alone. Whoever comes by an address, or by a name of this machine, is its user's; so is an allowed origin.
    """
    host, origin = request.headers.get("Host", ""), request.headers.get("Origin", "")
    embedded = request.headers.get("Sec-Fetch-Site") == "cross-site" and request.headers.get("Sec-Fetch-Mode") != "navigate"
    if (origin or embedded) and not _origin_known(node, origin):
        return ApiError(403, f"not for web pages of {(origin or 'other sites')[:100]!r}: see allow_origins").response()
    if is_of_this_machine(host.encode("latin-1", "replace")) or _origin_known(node, f"{request.scheme}://{host}"):
        return None
    return ApiError(403, f"not for web pages at {host[:100]!r}: see allow_origins").response()


def _refusal(node: Node, asked: Request | Websocket) -> Response | None:
    """Find out who asks; return the answer to one that may not."""
    who = admit(node, asked.headers.get("Authorization", ""), asked.args.get("authToken", ""), asked.path)
    if isinstance(who, Response):
        return who
    g.caller = who
    return None


def admit(node: Node, authorization: str, token: str, path: str) -> Caller | Response:
    """Return who asks, by the header or by the query's `authToken`; or the answer to one that may not."""
    key = key_in(authorization, token)
    if not key:
        return ApiError(401, "Missing application key").response()
    found = node.app_keys.find(key)
    if found is None:
        return ApiError(401, "Invalid application key").response()
    if found.identity != node.node_id and path not in OWN_PATHS:  # a key from before the node's identity was changed
        text = f"app-key {found.name!r} acts for {found.identity}; all objects here belong to {node.node_id}"
        return ApiError(403, text).response()
    return Caller(found.identity, found.name, found.role, found.allow_origins)


def _origin_known(node: Node, origin: str) -> bool:
    allowed = set(node.config.allow_origins).union(*(key.allow_origins for key in node.app_keys.all()))
    return bool(origin) and ("*" in allowed or origin in allowed)


def _cors(app: QuartTrio, node: Node) -> None:
    @app.after_request
    async def headers(response: Response) -> Response:
        response.headers["X-Trace-Id"] = g.trace  # `golem trace` tells what the request did
        origin = request.headers.get("Origin", "")
        who = getattr(g, "caller", None)
        allowed = {*node.config.allow_origins, *(who.allow_origins if who else ())}
        if origin and ("*" in allowed or origin in allowed or (request.method == "OPTIONS" and _origin_known(node, origin))):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Vary"] = "Origin"
            response.headers["Access-Control-Allow-Credentials"] = "true"
            if request.method == "OPTIONS":
                method = request.headers.get("Access-Control-Request-Method", "")
                response.headers["Access-Control-Allow-Methods"] = method or "GET, POST, PUT, DELETE, OPTIONS"
                wanted = request.headers.get("Access-Control-Request-Headers", "")
                response.headers["Access-Control-Allow-Headers"] = wanted or "authorization, content-type"
                response.headers["Access-Control-Max-Age"] = str(CORS_MAX_AGE_S)
        return response


def _errors(app: QuartTrio) -> None:
    @app.errorhandler(ApiError)
    async def api_error(error: ApiError) -> Response:
        return error.response()

    @app.errorhandler(HTTPException)
    async def http_error(error: HTTPException) -> Response:
        asked = websocket if has_websocket_context() else request
        text = error.description
        if error.code == 404:
            text = f"no such endpoint: {asked.method} {asked.path[:200]}"
        answer = ApiError(error.code or 500, text).response()
        if isinstance(error, MethodNotAllowed) and error.valid_methods:
            answer.headers["Allow"] = ", ".join(sorted(error.valid_methods))
        return answer

    @app.errorhandler(RowDamaged)
    async def damaged(error: RowDamaged) -> Response:
        log.error("%s (trace %s)", error, g.trace)
        return ApiError(500, f"{error} (trace {g.trace}; see `golem status`)").response()

    @app.errorhandler(Busy)
    async def busy(error: Busy) -> Response:
        return ApiError(503, f"busy, try again later: {error}").response()

    @app.errorhandler(Exception)
    async def our_bug(error: Exception) -> Response:
        asked = websocket if has_websocket_context() else request
        log.error("%s %s failed (trace %s)", asked.method, asked.path, g.trace, exc_info=error)
        return ApiError(500, f"internal error (trace {g.trace})").response()


def _root(app: QuartTrio, node: Node) -> None:
    @app.get("/me")
    async def me() -> Response:
        who = caller()
        return respond_json({"identity": who.identity, "name": who.name, "role": who.role})

    @app.get("/version/get")
    async def version() -> Response:
        since = timestamp_text(node.started_at)[:19]
        current = {
            "version": VERSION, "name": "golem-node", "seen": True,
            "releaseTs": since, "insertionTs": since, "updateTs": None,
        }  # fmt: skip
        return respond_json({"current": current, "pending": None})

    @app.get("/healthcheck")
    async def healthcheck() -> Response:
        problem = node.health_problem()
        if problem is None:
            return respond_json({"status": "ok"})
        body = {"type": "/error/health", "title": "unhealthy", "detail": problem}
        raise ApiError(500, problem, body, "application/problem+json")

    @app.get("/metrics-api/v1/expose")
    @app.get("/metrics-api/v1/sorted")
    @app.get("/metrics-api/v1/filtered")
    @app.get("/metrics-api/v1/filtered/<begins>")
    async def metrics(begins: str = "") -> Response:
        await load_prometheus()
        return Response(node.metrics_text(begins), content_type="text/plain; version=0.0.4")
