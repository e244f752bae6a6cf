"""The commands of `gatematch-bench` that need a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gatematch.bench.console import (
    MOST,
    Gpu,
    Json,
    app,
    one_sentence_errors,
    ready,
    save,
    show,
    within_bounds,
)


@app.command()
def tune(
    device: Gpu = "cuda",
    filter: Annotated[
        str, typer.Option(help="Only kernels whose name/arch/dtype matches this regular expression.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="The list to write; default: the package's own of this GPU.")
    ] = None,
    json: Json = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Processes that compile; default: one for each core.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after so long, with the best so far; default: never.")
    ] = None,
) -> None:
    """Choose the configurations of the kernels by measuring them on this GPU."""
    with one_sentence_errors():
        where = ready(device, json)
        from gatematch.bench.tune import run_tune

        typer.echo(f"configurations: {run_tune(where, filter, out, json, jobs, minutes, typer.echo)}")
    if json is not None:
        typer.echo(f"results: {json}")


@app.command()
def barrier(device: Gpu = "cuda", json: Json = None) -> None:
    """What a barrier over a grid of programs costs on this GPU, alone and with an exchange around it."""
    with one_sentence_errors():
        where = ready(device, json)
        from gatematch.bench import tables
        from gatematch.bench.barrier import run_barrier

        rows = run_barrier(where)
    show(tables.barrier(rows))
    save(json, where, rows)


@app.command()
def expansion(device: Gpu = "cuda", json: Json = None) -> None:
    """How exact distances from products of tensor cores are; exit code 1 when an error is past its bound."""
    with one_sentence_errors():
        where = ready(device, json)
        from gatematch.bench import tables
        from gatematch.bench.expansion import failed, run_expansion

        rows = run_expansion(where)
    show(tables.expansion(rows))
    save(json, where, rows)
    within_bounds(rows, failed(rows))


@app.command()
def gpu(
    stage: Annotated[
        list[str] | None, typer.Option(help="A stage, as tests; may be repeated. Default: all.")
    ] = None,
    json: Annotated[Path, typer.Option(help="Results file; the logs of the stages lie beside it.")] = Path(
        "out/gpu.json"
    ),
    limit: Annotated[float, typer.Option(min=1, help="Seconds for each stage.")] = 480,
    tests: Annotated[Path, typer.Option(help="The tests that need a GPU.")] = Path("tests/test_gpu.py"),
) -> None:
    """All that only a GPU can show: tests, compute-sanitizer, errors, speed; exit code 1 when a stage fails.

    Results of other stages stay in the file. GATEMATCH_COMMIT names the commit where there is no repository.
    """
    with one_sentence_errors():
        from gatematch.bench import tables
        from gatematch.bench.gpu import chosen_stages, failed, run_gpu

        chosen_stages(stage or [], tests)  # a wrong name is wrong without a GPU, too
        rows = run_gpu(ready("cuda", json), stage or [], json, limit, tests)
    show(tables.stages(rows))
    typer.echo(f"results: {json}")
    if failed(rows):
        raise typer.Exit(1)
