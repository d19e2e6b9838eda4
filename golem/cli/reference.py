"""Commands of the reference that have nothing to do here, and say so: `version`, `consent`, `extension`.

Scripts that call them go on; what cannot be honoured is refused with a sentence.
"""

from __future__ import annotations

import click

from golem.cli.output import done, fail, table, text, value, wants_json
from golem.config import VERSION

NOTHING_IS_SENT = "Nothing is sent: this node tells nobody how it is used, whatever is set here."


@click.group()
def version() -> None:
    """The version of this program."""


def _version() -> dict[str, object]:
    return {"current": {"version": VERSION, "name": "golem-node", "seen": True}, "pending": None}


@version.command("show")
def version_show() -> None:
    """Show the version."""
    value(_version())


@version.command("check")
def version_check() -> None:
    """Say where newer versions are told of: this program asks nobody."""
    value(_version()) if wants_json() else text(f"This is {VERSION}. Nobody is asked for newer ones: see `pip index versions`.")


@version.command("skip")
def version_skip() -> None:
    """Do nothing: no newer version is ever waiting."""
    done("There is nothing to skip: this program looks for no newer version.")


@click.group()
def consent() -> None:
    """What may be told of how the node is used: nothing ever is."""


@consent.command("show")
def consent_show() -> None:
    """Show what is sent: nothing."""
    value({"consents": []}) if wants_json() else text(NOTHING_IS_SENT)


@consent.command("allow", hidden=True)
@click.argument("what", required=False)
def consent_allow(what: str | None) -> None:
    """Refuse, since there is nothing to allow."""
    raise fail(NOTHING_IS_SENT)


@consent.command("deny", hidden=True)
@click.argument("what", required=False)
def consent_deny(what: str | None) -> None:
    """Agree: nothing is sent."""
    done(NOTHING_IS_SENT)


@click.group(hidden=True)
def extension() -> None:
    """Commands that other programs add: there are none."""


@extension.command("list")
def extension_list() -> None:
    """List the extensions: there are none."""
    table(["name", "command"], [], "There are no extensions.")


@extension.command("register", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def extension_register() -> None:
    """Refuse."""
    raise fail("this program has no extensions; whatever needs the node talks to its REST API")


def register(main: click.Group) -> None:
    for group in (version, consent, extension):
        main.add_command(group)
