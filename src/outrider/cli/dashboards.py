"""`outrider dashboards`: files for Prometheus and Grafana."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outrider.cli import paths, terminal
from outrider.cli.options import Json
from outrider.errors import ConfigError

dashboards_app = typer.Typer(help="Alert rules and dashboards for Prometheus and Grafana.", no_args_is_help=True)


@dashboards_app.callback()
def dashboards() -> None:
    """Files that watch a running server."""


@dashboards_app.command()
def export(
    folder: Annotated[Path, typer.Argument(callback=paths.out_folder, help="Folder to write them to.")] = Path(
        "dashboards"
    ),
    json: Json = False,
) -> None:
    """Write alerts.yml (with its tests) and grafana.json to FOLDER.

    Example: outrider dashboards export dashboards
    """
    from outrider.telemetry import dashboards as files

    try:
        written = [str(path) for path in files.export(folder)]
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}): choose another folder") from None
    if json:
        terminal.print_json({"files": written})
    else:
        typer.echo("\n".join(written))
