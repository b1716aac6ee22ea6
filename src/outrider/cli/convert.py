"""`outrider convert`: a folder in Hugging Face format to a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outrider.cli import paths, terminal
from outrider.cli.options import Json
from outrider.errors import ConfigError


def convert(
    model: Annotated[
        str,
        typer.Argument(
            callback=paths.model, help="A folder in Hugging Face format, or a Hub name.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Argument(callback=paths.out_file, help="The GGUF file to write.", show_default=False)],
    kind: Annotated[
        str,
        typer.Option(
            "--type",
            help="Type of the weights: q8_0, q6_k, q5_k, q5_1, q5_0, q4_k, q4_1, q4_0, bf16, f16, f32, or mxfp4 for experts.",
        ),
    ] = "q8_0",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    json: Json = False,
) -> None:
    """Write a model as a GGUF file, for Outrider or any program that reads GGUF.

    Embedding and output matrix get at least 6 bits, norms and biases stay float32, and rows that are no whole blocks of the
    type get a wider one, as in llama.cpp. The written file is read again and checked. Needs outrider[gguf].

    Example: outrider convert my-model my-model-q8_0.gguf --type q8_0
    """
    paths.needs("gguf", ("gguf",))
    from outrider.models.convert import convert as write
    from outrider.models.folder import resolve_folder
    from outrider.models.gguf.checkpoint import GgufCheckpoint

    folder = resolve_folder(model)
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is a GGUF file already: give the folder in Hugging Face format that it was made from"
        )
    if out.suffix.lower() != ".gguf":
        raise ConfigError(f"{out} does not end in .gguf: name the file so, programs know it by that")
    if out.exists() and not force:
        raise ConfigError(f"{out} is there already: choose another name, or --force to replace it")
    with terminal.loading("writing") as told:
        found = write(folder, out, kind.lower(), told)
    written = GgufCheckpoint(out)  # whose checks it must pass
    if json:
        terminal.print_json(
            {"file": str(out), "bytes": out.stat().st_size, "types": found, "parameters": written.parameters}
        )
        return
    bits = 8 * out.stat().st_size / written.parameters
    told_types = ", ".join(
        f"{name} {count / 2**20:.1f} MiB" for name, count in sorted(found.items(), key=lambda i: -i[1])
    )
    terminal.say(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, {bits:.2f} bits a weight ({told_types})")
