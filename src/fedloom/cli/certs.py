"""`fedloom certs`: who is who in a federation over a network."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli import output
from fedloom.errors import UsageError

if TYPE_CHECKING:
    from fedloom.deploy.certificate import Request
    from fedloom.deploy.shown import Line

FOLDER = Path("certs")  # of all folders, unless another is given
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the client or server, the same in all runs.")]
Hosts = Annotated[
    list[str] | None, typer.Option("--host", help="DNS name or IP address at which clients dial a server; repeatable.")
]
Organisation = Annotated[str | None, typer.Option(help="Organisation that the client or server belongs to.")]
Place = Annotated[Path | None, typer.Option("--folder", help="Folder of the key (default: certs/NAME).")]
Ca = Annotated[Path, typer.Option("--ca", help="Folder of the certificate authority.")]
Days = Annotated[int, typer.Option(help="Days for which the certificates are valid.")]


def app(epilog: str, whole: bool = True) -> typer.Typer:
    """The commands below `certs`; not the `whole` of it where nobody asks for them, since to make them takes time."""
    made = typer.Typer(help="Make and show the certificates by which machines know each other.")
    made.callback(invoke_without_command=True)(top)
    for command in (init, request, sign, install, show, laptop) if whole else ():
        made.command(epilog=epilog)(command)
    return made


def top(context: typer.Context) -> None:
    """What `certs` does by itself: it says what it can."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def init(
    federation: Annotated[str, typer.Argument(metavar="FEDERATION", help="Name of the federation.")],
    folder: Annotated[Path, typer.Option(help="New folder of the authority.")] = FOLDER / "ca",
    days: Annotated[int, typer.Option(help="Days for which the authority is valid.")] = 3652,
) -> None:
    """Make a certificate authority, which signs who may take part."""
    from fedloom.deploy import authority

    made = authority.init(folder, federation, days)
    typer.echo(f"authority:   {made.folder}, of {made.name}; keep it where nobody else comes, offline if you can")
    typer.echo(f"fingerprint: {made.fingerprint}")


def request(
    name: Name,
    role: Annotated[str, typer.Option(help="client or server.")] = "client",
    host: Hosts = None,
    organisation: Organisation = None,
    folder: Place = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="Ask again with the key that is there, for a certificate that lasts longer.")
    ] = False,
) -> None:
    """Make a key, and a request for its certificate that may be mailed to the authority."""
    from fedloom.deploy import certs
    from fedloom.deploy.certificate import fingerprint
    from fedloom.deploy.identity import named

    place = folder or FOLDER / named(name)
    if renew:
        asked, path = certs.renew(place, name, host or (), organisation)
    else:
        asked, path = certs.request(place, name, role, host or (), organisation)
    typer.echo(f"for:         {_said(asked)}")
    typer.echo(f"fingerprint: {fingerprint(asked.key)}")
    typer.echo(f"request:     {path}; mail it to the authority, and tell the fingerprint by another way")


def sign(
    path: Annotated[Path, typer.Argument(metavar="REQUEST", help="File that was mailed.")],
    ca: Ca = FOLDER / "ca",
    days: Days = 90,
    out: Annotated[
        Path | None, typer.Option(help="New file to mail back (default: NAME.bundle.pem beside REQUEST).")
    ] = None,
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Sign although the name was given to another key, which is lost.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Sign without asking.")] = False,
) -> None:
    """Sign a request, as the authority: who it is for is shown, and asked, before."""
    from fedloom.deploy import files
    from fedloom.deploy.authority import Authority
    from fedloom.deploy.certificate import fingerprint, moment
    from fedloom.deploy.certs import read_request

    authority, asked = Authority(ca), read_request(path)
    target = out or path.with_name(f"{asked.identity.name}.bundle.pem")
    typer.echo(f"for:         {_said(asked)}")
    typer.echo(f"fingerprint: {fingerprint(asked.key)}")
    authority.check(asked, new_key)
    files.require_new(target)
    if not yes:
        if not _at_terminal():
            raise UsageError("nobody is here to be asked; compare the fingerprint, then add --yes")
        if not _agreed(f"sign it for {authority.name}? (compare the fingerprint with what its owner says)"):
            raise UsageError("nothing was signed")
    made, bundle = authority.sign(asked, days, new_key)
    files.write(target, bundle)
    typer.echo(f"valid until: {moment(made.until)}")
    typer.echo(f"bundle:      {target}; mail it back")


def install(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="File that the authority mailed back.")],
    folder: Place = None,
    ca: Annotated[
        str | None, typer.Option("--authority", metavar="FINGERPRINT", help="Refuse any other authority's.")
    ] = None,
) -> None:
    """Put a signed certificate beside its key, once it fits the key, the request and the authority."""
    from fedloom.deploy import certs, files
    from fedloom.deploy.certificate import fingerprint, moment

    content = files.read(path, "bundle")
    place = folder or FOLDER / certs.Bundle.of(content, str(path)).identity.name
    held = certs.install(content, str(path), place, ca)
    until = moment(held.bundle.certificate.until)
    typer.echo(f"installed:   {held.folder}, of the {held.identity}, valid until {until}")
    known = fingerprint(held.bundle.authority.public_key())
    typer.echo(f"authority:   {known}" + ("" if ca else "; compare it with what the authority says"))


def show(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Certificate, bundle or request; or a folder of any of these.")
    ] = FOLDER,
    as_json: output.Json = False,
) -> None:
    """Show who certificates and requests are for, until when they are valid, and what ends soon."""
    from fedloom.deploy.certificate import today
    from fedloom.deploy.shown import shown

    lines, at = shown(path), today()
    warnings = [line.warning(at) for line in lines]
    if as_json:
        told = zip(lines, warnings, strict=True)
        output.tell_json([line.plain() | {"warning": one and one[1]} for line, one in told])
        return
    _print(lines, [one for one in warnings if one])


def laptop(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder for all keys and certificates.")],
    clients: Annotated[str, typer.Option(metavar="NAME,NAME,..", help="Names of the clients.")],
    host: Hosts = None,
    days: Days = 90,
) -> None:
    """Make a whole federation on one machine: an authority, a server, and clients, each in its folder."""
    from fedloom.deploy.certs import laptop as made

    for held in made(folder, clients.split(","), host or (), days):
        typer.echo(f"{held.folder}: {held.identity}")
    typer.echo(f"whoever reads {folder} has everybody's keys; for several machines use request, sign and install")


def _print(lines: Sequence[Line], warnings: Sequence[tuple[int, str]]) -> None:
    from rich.table import Table

    from fedloom.cli.tables import console
    from fedloom.deploy.certificate import moment

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("name", "role", "organisation", "valid until", "fingerprint", "hosts"):
        table.add_column(name, no_wrap=name in ("valid until", "fingerprint"))
    for line in lines:
        until = moment(line.until) if line.until else "requested"
        table.add_row(line.name, line.role, line.organisation or "", until, line.fingerprint, ", ".join(line.hosts))
    out = console()
    out.print(table)
    for mark, sentence in warnings:
        out.print(f"warning: {sentence}", style="red" if mark <= 3 else "yellow", soft_wrap=True)


def _at_terminal() -> bool:
    return sys.stdin.isatty()


def _agreed(question: str) -> bool:
    try:
        return typer.confirm(question)
    except typer.Abort:  # the end of the input
        return False


def _said(asked: Request) -> str:
    return str(asked.identity) + (f" at {', '.join(asked.hosts)}" if asked.hosts else "")
