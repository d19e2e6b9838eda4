"""`golem run` (alias `yagna service run`): the node in the foreground; `service shutdown` stops it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from golem.base.dotenv_file import dot_env
from golem.base.hosts import is_this_machine
from golem.base.printing import set_up_logs
from golem.cli.client import ask_node, config_of
from golem.cli.output import done, fail, say

if TYPE_CHECKING:
    from golem.node.node import Node

OPTIONS = (
    click.option("--api-url", metavar="URL",
                 help="Where to serve REST. [YAGNA_API_URL; http://127.0.0.1:7465, or a free port]"),
    click.option("--profile", type=click.Choice(["local", "testnet", "mainnet"]),
                 help="Which chains: the embedded one, test networks, main networks. [local]"),
    click.option("--listen", multiple=True, metavar="HOST:PORT",
                 help="Where to listen for peers. [every interface, a free port]"),
    click.option("--bootstrap", multiple=True, metavar="MULTIADDR", help="A peer to begin with (beyond the LAN)."),
    click.option("--no-mdns", is_flag=True, help="Do not look for peers on the LAN."),
    click.option("--network-name", metavar="NAME", help="Nodes of different network names never meet. [golem]"),
    click.option("--chain-dir", type=click.Path(path_type=Path), help="Where the embedded chain of this machine lives."),
    click.option("--chain-url", metavar="URL", help="A dev chain to use instead, of another machine or node (local profile). "
                 "[GOLEM_CHAIN_URL; see golem chain run --host]"),
    click.option("--password-file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
                 help="File with the password of the node's key."),
    click.option("--plain-key", is_flag=True, help="Keep the node's key unencrypted (for automation)."),
    click.option("--api-allow-origin", "allow_origins", multiple=True, metavar="ORIGIN",
                 help="CORS origin that browsers may use."),
    click.option("--debug", is_flag=True, help="Log much."),
    click.option("--max-rest-timeout", "max_rest_timeout_s", type=click.FloatRange(1, 86400), hidden=True),
    click.option("--log-dir", hidden=True),
    click.option("--disable-metrics-push", is_flag=True, hidden=True),
)  # fmt: skip


def _run_options(function: Any) -> Any:
    for option in reversed(OPTIONS):
        function = option(function)
    return function


def run_command(debug: bool, no_mdns: bool, **flags: Any) -> None:
    """Run a node.

    It runs in the foreground until it is told to stop (Ctrl-C, SIGTERM, `golem service shutdown`).
    """
    import trio

    from golem.config import ConfigError

    for ignored in ("log_dir", "disable_metrics_push"):
        flags.pop(ignored, None)
    if no_mdns:
        flags["mdns"] = False
    config = config_of(**flags)
    # our own packages speak; of what they stand on (libp2p alone writes pages) only warnings are heard
    set_up_logs(logging.WARNING, "%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    for ours in ("golem", "actors"):
        logging.getLogger(ours).setLevel(logging.DEBUG if debug else logging.INFO)
    logging.getLogger("golem.http").setLevel(logging.WARNING)
    from actors.kernel.records import JournalClosed, JournalError
    from golem.daemon import run_node
    from golem.net import NetError
    from golem.node.identity import IdentityError

    if note := dot_env().note():
        logging.getLogger("golem.config").warning("%s", note)
    ask_password = _ask_password if sys.stdin.isatty() else None
    try:
        trio.run(run_node, config, ask_password, lambda node: _say_ready(node, config.api_port, config.api_port_fixed))
    except BaseExceptionGroup as group:
        known, rest = group.split((ConfigError, IdentityError, JournalError, NetError, OSError))
        if known is None or rest is not None:
            raise
        causes = known.split(JournalClosed)[1] or known  # who finds the journal closed says nothing of why
        raise fail("; ".join(_said(error, config.data_dir) for error in _flat(causes))) from None
    except (ConfigError, IdentityError, JournalError, NetError, OSError) as error:
        raise fail(_said(error, config.data_dir)) from None
    except KeyboardInterrupt:
        sys.exit(130)


def _said(error: BaseException, data_dir: Path) -> str:
    """Return an error's text; of an error of the system (a full disk, for one) that which says where."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or data_dir}: {error.strerror}"
    return str(error)


def _flat(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    return [leaf for error in group.exceptions for leaf in (_flat(error) if isinstance(error, BaseExceptionGroup) else [error])]


def _ask_password(prompt: str, twice: bool) -> str:
    return str(click.prompt(prompt, hide_input=True, confirmation_prompt=twice, err=True))


def _say_ready(node: Node, wanted_port: int, fixed: bool) -> None:
    port = int(node.api_url.rpartition(":")[2])
    if not fixed and port != wanted_port:
        say(f"Port {wanted_port} is taken: this node serves REST on port {port}.")
    say(f"Node {node.node_id} is ready.")
    say(f"  REST     {node.api_url}")
    if warning := _clear_text(node.config.api_host):
        say(warning)
    say(f"  data     {node.config.data_dir}")
    chain = f"dev chain at {node.config.chain_url}" if node.config.chain_url else "embedded dev chain"
    simulated = f" (payments run on the {chain}; no real money)" if node.config.profile == "local" else ""
    say(f"  profile  {node.config.profile}{simulated}")
    if not node.app_keys.all():
        say("  next     golem app-key create requestor")


def _clear_text(host: str) -> str:
    """Return the warning where REST is served beyond this machine, "" where it is not."""
    if is_this_machine(host.encode()) and host not in ("0.0.0.0", "::"):
        return ""
    return f"  warning  REST on {host} is plain HTTP: who can listen on the network has every app-key that is sent to it"


@click.group()
def service() -> None:
    """The daemon, by the reference's names."""


service.command("run")(_run_options(run_command))


@service.command("shutdown")
@click.option("--gracefully", is_flag=True, hidden=True)
def service_shutdown(gracefully: bool) -> None:
    """Stop the running node."""
    ask_node("shutdown")
    done("The node is told to stop: it ends what it has begun.")


def register(main: click.Group) -> None:
    main.command("run")(_run_options(run_command))
    main.add_command(service)
