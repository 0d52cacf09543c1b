"""`fedloom columns`, `server`, `client` and `replay`: a run between machines, before it, at its ends, and once more."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli import output
from fedloom.errors import UsageError

Config = Annotated[Path, typer.Option(help="File of its settings, in TOML.")]


def columns(
    name: Annotated[str, typer.Argument(metavar="TABLE", help="Data of one site: a file, a folder, or hf:NAME.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=VALUE", help="How to read them, such as label=diagnosis.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New file, NAME.columns.yaml (default: named as the table).")] = None,
) -> None:
    """Write down what the rows of a table mean (columns, classes, scales), and none of them: for a server without."""
    from fedloom.data.files import COLUMNS
    from fedloom.tasks._described import learned

    path = out or Path(f"{Path(name).name.partition('.')[0]}{COLUMNS}")
    if not path.name.endswith(COLUMNS):
        raise UsageError(f"--out {path}: its name has to end in {COLUMNS}")
    if path.exists():
        raise UsageError(f"{path} exists; choose another --out")
    meaning = learned(name, overrides or ())
    try:
        path.write_text(meaning.text(), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; choose another --out") from error
    typer.echo(path)
    typer.echo(f"It has no row, but what was learned of {meaning.source}: look into it before you give it away.")


def server(
    spec: Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="Spec of the run.")],
    config: Config = Path("server.toml"),
    out: Annotated[Path | None, typer.Option(help="Folder of the run; one that is there is taken up.")] = None,
    as_json: output.Json = False,
) -> None:
    """Train with clients on machines of their own; start it again to go on where it stopped."""
    from fedloom.cli.progress import Watch
    from fedloom.cli.running import carried_out, tell_end
    from fedloom.deploy.config import ServerConfig
    from fedloom.deploy.serve import Serving
    from fedloom.runs.spec import Spec

    serving = Serving(Spec.read(spec), ServerConfig.read(config), out or Path("runs") / spec.stem)
    finished = False
    try:
        with Watch(quiet=as_json) as watch:
            watch.says(f"listening at port {serving.listening.port} for {len(serving.hub.members)} clients")
            serving.gather(lambda missing: watch.waits(f"waiting for {', '.join(missing)}"))
            experiment = serving.experiment()
            with experiment.record.lock():
                ended = carried_out(experiment, watch, f"fedloom server {spec} --config {config} --out {serving.out}")
        finished = True
    finally:
        serving.close(finished)
    tell_end(ended, as_json)


def client(
    config: Config = Path("client.toml"),
    leave: Annotated[bool, typer.Option("--leave", help="Tell the server that it does not come back.")] = False,
) -> None:
    """Take part in the run of a server with data that stay here; start it again to go on where it stopped."""
    from fedloom.cli.progress import Doing
    from fedloom.deploy.agent import Agent
    from fedloom.deploy.config import ClientConfig

    with Doing() as doing:
        agent = Agent(ClientConfig.read(config), doing)
        try:
            agent.leave() if leave else agent.run()
        except KeyboardInterrupt as stop:
            stop.args = (f"stopped; go on with: fedloom client --config {config}",)
            raise
    if agent.model:
        typer.echo(f"Its own model, which no other side has: fedloom predict {shlex.quote(str(agent.model))} FILE")


def replay(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run of `fedloom server`.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Data of a client that brought its own, or its .toml; once for each."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New folder for the run that is carried out again.")] = None,
    as_json: output.Json = False,
) -> None:
    """Carry out a deployed run once more on this machine: who was heard then is heard, and the bits are the same."""
    from fedloom.cli.progress import Watch
    from fedloom.cli.running import carried_out, tell_end
    from fedloom.deploy.replay import confirm, places, replayed

    if out is not None and out.exists():
        raise UsageError(f"{out} exists; give a new folder")
    with Watch(quiet=as_json) as watch:
        experiment = replayed(path, out, data=places(data or ()))
        with experiment.record.lock():
            ended = carried_out(experiment, watch)
    tell_end(ended, as_json)
    confirm(path, ended)
    if not as_json:
        typer.echo(f"The same bits as {path}.")
