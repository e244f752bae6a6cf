"""What the commands of `gatematch-bench` share: the application, options, errors of a sentence, output."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import gatematch

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    help="Benchmarks of gatematch: LSTM and pairwise attention beside PyTorch's own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gatematch {gatematch.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Every command writes its results as JSON; tables and pictures are drawn from that."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what is no terminal gets each line at once, too


MOST = 1024  # threads or processes: the system ends a process that asks for many times as many
Device = Annotated[str, typer.Option(help="Where to run, as torch names it: cpu, cuda, cuda:1.")]
Gpu = Annotated[str, typer.Option(help="The GPU, as torch names it.")]
Json = Annotated[Path | None, typer.Option(help="Results file.")]


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """A wrong file or option, or no triton, ends the command with one sentence on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sentence = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            sentence = f"{error.filename} cannot be used: {error.strerror}"
        typer.echo(f"Error: {sentence}", err=True)
        raise typer.Exit(2) from None


def show(table: str) -> None:
    """A table in Markdown: drawn in a terminal, and as it is in a pipe or a file."""
    if not sys.stdout.isatty():
        typer.echo(table)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(table))


def within_bounds(rows: list[dict[str, Any]], bad: list[dict[str, Any]]) -> None:
    """Say so; or name the rows that are not, and end with exit code 1."""
    for row in bad:
        name = " ".join(filter(None, (row["case"], row.get("setting"), row.get("dtype"))))
        typer.echo(f"past its bound: {name}" + (f": {row['reason']}" if "reason" in row else ""), err=True)
    if bad:
        typer.echo(f"{len(bad)} of {len(rows)} are past their bound", err=True)
        raise typer.Exit(1)
    typer.echo(f"all {len(rows)} within their bounds")


def ready(device: str, json: Path | None) -> torch.device:
    """The device, when it and the results file can be used."""
    from gatematch.bench.results import writable

    if json is not None:
        writable("--json", json)
    return usable_device(device)


def usable_device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device must be one that torch can use here, as cpu; got {name!r}: {reason}"
        ) from None
    return device


def save(path: Path | None, device: torch.device, rows: list[dict[str, Any]], **more: Any) -> None:
    from gatematch.bench.results import describe_machine, write_results

    if path is not None:
        write_results(path, describe_machine(device) | more, rows)
        typer.echo(f"results: {path}")
