"""The command line, `gatematch-bench`: thin glue from options to the jobs, which are imported when run."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit(f'gatematch-bench needs {missing.name}: pip install "gatematch[bench]"') from None

from gatematch.bench.console import (
    MOST,
    Device,
    Json,
    app,
    one_sentence_errors,
    ready,
    save,
    show,
    usable_device,
    within_bounds,
)


@app.command()
def answers(
    model: Annotated[str, typer.Option(help="What to train: lstm, bcnn, abcnn1, abcnn2 or abcnn3.")] = "lstm",
    data: Annotated[
        Path | None,
        typer.Option(
            help="TSV with columns question_id, question, answer, label; default chatterbot-corpus."
        ),
    ] = None,
    dev: Annotated[
        Path | None, typer.Option(help="TSV to choose the epoch on; default: split off data.")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="TSV to report on; default: split off data.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each model.")] = 8,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of weights, order, dropout; the splits do not change.")
    ] = 0,
    device: Annotated[str, typer.Option(help="Where to train, as torch names it.")] = "cpu",
    threads: Annotated[
        int, typer.Option(min=1, max=MOST, help="CPU threads; matrices this small gain nothing from more.")
    ] = 1,
    out: Annotated[Path, typer.Option(help="Folder of results, pictures and checkpoint.")] = Path(
        "out/answers"
    ),
    json: Annotated[Path | None, typer.Option(help="Results file; default OUT/results.json.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in OUT.")] = False,
) -> None:
    """Train a siamese model to pick the right answer; compare with BM25, and the LSTM one with torch's."""
    from rich.console import Console

    from gatematch.bench.answers.models import settings_of
    from gatematch.bench.answers.run import Interrupted, Options, run

    with one_sentence_errors():
        options = Options(data, dev, test, epochs, usable_device(device), threads, out, json, resume)
        try:
            run(options, settings_of(model, seed), Console())
        except Interrupted as interruption:
            typer.echo(str(interruption), err=True)
            raise typer.Exit(130) from None


@app.command()
def check(device: Device = "cpu", json: Json = None) -> None:
    """Every op and module against float64; exit code 1 when an error is past its bound."""
    from gatematch.bench import tables
    from gatematch.bench.check import failed, run_check

    with one_sentence_errors():
        where = ready(device, json)
        rows = run_check(where)
    show(tables.check(rows))
    save(json, where, rows)
    within_bounds(rows, failed(rows))


@app.command()
def speed(
    device: Device = "cpu",
    json: Json = None,
    filter: Annotated[
        str, typer.Option(help="Only cases whose name, data and dtype match this regular expression.")
    ] = "",
    seconds: Annotated[float, typer.Option(min=0.01, max=3600, help="Time to spend on each row.")] = 2.0,
    compiled: Annotated[bool, typer.Option(help="Include the peers that torch.compile makes.")] = True,
) -> None:
    """Ours beside torch's own, forward and forward+backward, each row right before it is timed; exit code 1
    when one of ours is wrong."""
    from gatematch.bench.results import describe_machine, write_results
    from gatematch.bench.speed import call_once, chosen, in_turns, run_speed
    from gatematch.bench.speed_report import faults, speed_tables

    with one_sentence_errors():
        where = ready(device, json)
        cases = chosen(where, filter)
        more: dict[str, Any] = {}
        if where.type == "cuda":
            from gatematch.bench.ahead import compile_ahead
            from gatematch.bench.ceilings import ceilings

            once = partial(call_once, device=where, compiled=compiled)
            typer.echo(compile_ahead(in_turns(cases), once, where))
            more["ceilings"] = ceilings(where)
        meta = describe_machine(where) | more

        def keep(rows: list[dict[str, Any]]) -> None:
            if json is not None:
                write_results(json, meta, rows)

        rows = run_speed(cases, where, seconds, compiled, more.get("ceilings"), keep)
    show(speed_tables(rows))
    if json is not None:
        typer.echo(f"results: {json}")
    if bad := faults(rows):
        typer.echo(f"{len(bad)} of {len(rows)} rows are wrong or failed", err=True)
        raise typer.Exit(1)


@app.command()
def kernels(
    arch: Annotated[
        list[str] | None, typer.Option(help="An architecture, as sm_90; may be repeated. Default: all.")
    ] = None,
    json: Json = None,
    filter: Annotated[
        str, typer.Option(help="Only kernels whose name/arch/dtype matches this regular expression.")
    ] = "",
    jobs: Annotated[int, typer.Option(min=1, max=MOST, help="Processes that compile.")] = 1,
) -> None:
    """What every kernel compiles to, without a GPU; exit code 1 when one spills or does not fit."""
    with one_sentence_errors():
        where = ready("cpu", json)
        from gatematch.bench import tables
        from gatematch.bench.kernels import ARCHITECTURES, faults, run_kernels

        rows = run_kernels(arch or list(ARCHITECTURES), filter, jobs)
    show(tables.kernels(rows))
    save(json, where, rows)
    bad = [(row["case"], fault) for row in rows for fault in faults(row)]
    for case, fault in bad:
        typer.echo(f"{case}: {fault}", err=True)
    if bad:
        raise typer.Exit(1)


@app.command("hessian")
def curvature(
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="A checkpoint.pt of `answers` with its built-in data; default: train the model here."
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs to train, without --checkpoint.")] = 8,
    questions: Annotated[
        int, typer.Option(min=1, help="Training questions that the matcher's loss is the mean over.")
    ] = 8,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of weights, training, questions and random vectors.")
    ] = 0,
    out: Annotated[Path, typer.Option(help="Folder of results and pictures.")] = Path("out/hessian"),
    json: Annotated[Path | None, typer.Option(help="Results file; default OUT/results.json.")] = None,
) -> None:
    """The Hessian of the answer matcher before and after training (largest eigenvalues, trace, density),
    the whole one of a small LSTM gate by gate, and what a matrix and a product cost. Runs on the CPU."""
    from gatematch.bench import tables
    from gatematch.bench.hessian import Options, run_hessian
    from gatematch.bench.plots import draw
    from gatematch.bench.results import writable

    results = json or out / "results.json"
    with one_sentence_errors():
        writable("pictures in --out", out / "hessian.svg")
        where = ready("cpu", results)
        rows = run_hessian(Options(checkpoint, epochs, questions, seed), typer.echo)
        show(tables.hessian(rows))
        save(results, where, rows)
        typer.echo(f"pictures: {', '.join(map(str, draw(results, out)))}")


@app.command()
def plot(
    results: Annotated[Path, typer.Argument(help="A results file of `answers`, `speed` or `hessian`.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the pictures; default: beside the file.")
    ] = None,
) -> None:
    """Draw the pictures of a results file again."""
    from gatematch.bench.plots import draw

    with one_sentence_errors():
        for path in draw(results, out or results.parent):
            typer.echo(path)


@app.command()
def overview(
    results: Annotated[Path, typer.Argument(help="A folder with answers.json, speed.json and hessian.json.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the picture; default: that of the results.")
    ] = None,
) -> None:
    """Draw one picture of the results of `answers`, `speed` and `hessian`."""
    from gatematch.bench.overview import overview as draw_overview
    from gatematch.bench.plots import save as save_pictures

    with one_sentence_errors():
        for path in save_pictures(draw_overview(results), out or results):
            typer.echo(path)


@app.command()
def table(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="A results file of `answers`, `speed`, `kernels`, `hessian`, `gpu`, `barrier`, `expansion` "
            "or an example, or several of `answers`."
        ),
    ],
) -> None:
    """Print results as a Markdown table."""
    from gatematch.bench.markdown import markdown

    with one_sentence_errors():
        typer.echo(markdown(*results))


@app.command()
def pages(
    files: Annotated[list[Path], typer.Argument(help="Markdown pages, whose tables name their results.")],
) -> None:
    """Write tables and figures of Markdown pages again, from the results files below this folder."""
    from gatematch.bench.markdown import redrawn
    from gatematch.bench.results import read_text

    with one_sentence_errors():
        for path in files:
            before = read_text("page", path)
            if (after := redrawn(before, Path())) != before:
                path.write_text(after, "utf-8")
                typer.echo(path)


# In the order in which --help lists them: last those that need a GPU.
from gatematch.bench import gpu_commands  # noqa: E402, F401

if __name__ == "__main__":
    sys.exit(app())
