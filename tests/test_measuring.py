"""The commands that measure a GPU, without one: errors, statistics of made-up times, what is compiled."""

import itertools
import os
import re
import signal
import threading
from unittest import mock

import pytest
import torch
import waiting

triton = pytest.importorskip("triton")
pytest.importorskip("rich")
from typer.testing import CliRunner  # noqa: E402

from gatematch.bench import barrier, expansion  # noqa: E402
from gatematch.bench.__main__ import app  # noqa: E402
from gatematch.bench.kernels import _output, _read_cubin, compiled  # noqa: E402
from gatematch.bench.markdown import markdown  # noqa: E402
from gatematch.bench.results import describe_machine, read_results, write_results  # noqa: E402
from gatematch.kernels import config, pairwise, pairwise_stream  # noqa: E402
from gatematch.kernels.pairwise_prepare import prepare  # noqa: E402

CPU = torch.device("cpu")
# Register allocation changes from version to version; this is the one of constraints.txt.
GATED = "3.6.0"
PATHS = {path.name: path for path in expansion.paths()}


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("barrier", "an NVIDIA GPU, for barrier times a kernel on it; got cpu"),
        ("expansion", "a GPU, for expansion measures its tensor cores: the kernels run on CUDA; got cpu"),
    ],
)
def test_a_cpu_is_refused(command, error, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    said = CliRunner().invoke(app, [command, "--device", "cpu"])
    assert said.exit_code == 2
    assert said.output == f"Error: --device must be {error}\n"


@pytest.mark.parametrize("most", [1, 7, 128, 132])
def test_no_grid_has_more_programs_than_there_are_multiprocessors(most):
    settings = barrier.settings(most)
    assert len(set(settings)) == len(settings)
    sizes = {setting.programs for setting in settings}
    assert sizes == {n for n in (1, 2, 4, 8, 16, 32, 64, 128, most) if n <= most}
    assert len(settings) == len(sizes) * 4  # two variants, each with two numbers of warps


def test_the_launch_is_not_in_the_time_of_a_step(monkeypatch):
    """250 ns a step, a launch of 7 us, and one pair of launches that something else made slow."""
    queued = []

    def events(setting, steps, device):
        queued.append(steps)
        slow = 1.0 if len(queued) == 10 else 0.0
        return mock.Mock(elapsed_time=lambda end: 7e-3 + steps * 250e-6 + slow), None

    monkeypatch.setattr(barrier, "events", events)
    monkeypatch.setattr(barrier, "check", checked := mock.Mock())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    setting = barrier.Setting("exchange", 16, 8)
    row = barrier.time_setting(setting, 100, 20, CPU)
    assert checked.call_args.args == (setting, 200, CPU)
    assert queued == [100, 200] * 20
    assert row.pop("ns") == pytest.approx(250)
    assert row.pop("spread") == pytest.approx(0, abs=1e-6)
    assert row == {
        "case": "barrier/exchange/programs 16",
        "variant": "exchange",
        "programs": 16,
        "warps": 8,
        "steps": 100,
        "samples": 20,
    }


def test_the_command_barrier(tmp_path):
    row = {**barrier.Setting("barrier", 132, 4)._asdict(), "steps": 1000, "ns": 1234.4, "spread": 5.6}
    rows = [{"case": "barrier/barrier/programs 132", **row, "samples": 25}]
    path = tmp_path / "barrier.json"
    with mock.patch.object(barrier, "run_barrier", return_value=rows):
        said = CliRunner().invoke(app, ["barrier", "--device", "cpu", "--json", str(path)])
    assert said.exit_code == 0 and "| barrier | 4 | 1234 |" in said.output
    assert read_results(path)["rows"] == rows


@pytest.mark.parametrize(
    ("name", "c", "error", "bad"),
    [
        ("float32", 16.0, 9e-7, False),
        ("float32", 17.0, 1e-7, True),  # leaves more than 1e-6
        ("float32", 2.0, 1.1e-6, True),
        ("float32", float("nan"), float("nan"), True),
        ("tf32", 100.0, 2e-4, False),
        ("bfloat16", 100.0, 1.9e-3, False),
        ("bfloat16", 100.0, 2e-3, True),
        ("float16 streamed", 100.0, 2.4e-4, False),
        ("float16 streamed", 100.0, 2.5e-4, True),
    ],
)
def test_the_command_expansion_fails_past_a_bound(name, c, error, bad, tmp_path):
    left = c * 2.0**-24 / (8 * 0.125)
    row = {"case": f"expansion/{name}/D 300", "path": name, "D": 300, "c": c, "left": left, "error": error}
    row |= {"bound": PATHS[name].bound, "tau_needed": left * 0.125 / 1e-6}
    path = tmp_path / "expansion.json"
    with mock.patch.object(expansion, "run_expansion", return_value=[row]):
        said = CliRunner().invoke(app, ["expansion", "--device", "cpu", "--json", str(path)])
    assert said.exit_code == bad and (f"past its bound: {row['case']}\n" in said.output) == bad
    assert markdown(path).splitlines()[2] in said.output, "numbers that are none are the same in both"


def test_rows_are_close_and_far_and_of_many_norms():
    tiles = 20
    x, y = (rows.double() for rows in expansion.close_rows(tiles, 64, 32, 300, CPU))
    share = (x[:, :, None] - y[:, None]).square().sum(-1)
    share /= x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None]
    assert share.min() == 0
    for low, high in ((1e-4, 1e-2), (1e-2, 1 / 8), (1 / 8, 1 / 4), (1 / 4, 1)):
        assert ((share > low) & (share < high)).sum() > 5 * tiles
    norms = x.norm(dim=-1).mean(1)
    want = torch.tensor(expansion.NORMS).repeat(3)[:tiles].double()
    assert ((norms / want - 1).abs() < 0.2).all()
    # Or prepared copies would be less their centre, and rounded to 16 bits once more.
    sample = y[:, ::4]
    assert (sample.mean(1).square().sum(-1) < 0.5 * sample.square().sum(-1).mean(1)).all()


def binary(kernel, launch):
    (found,) = compiled(kernel, "sm_90", launch)
    used = _read_cubin(found.asm["cubin"])
    if triton.__version__ == GATED:
        assert used["spills"] == used["stack_bytes"] == 0
    return found


@pytest.mark.parametrize(
    ("variant", "kernel", "programs", "warps"),
    [("barrier", "barriers", 128, 8), ("exchange", "exchanges", 132, 4)],
)
def test_a_barrier_releases_and_acquires(variant, kernel, programs, warps, tmp_path):
    found = binary(kernel, barrier.prepared(barrier.Setting(variant, programs, warps), 9, CPU)[0])
    assert found.metadata.launch_cooperative_grid
    path = tmp_path / "cubin"
    path.write_bytes(found.asm["cubin"])
    sass = _output([triton.knobs.nvidia.nvdisasm.path, "-c", str(path)])
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", sass, re.M)
    memory = " ".join(o for o in opcodes if re.match(r"STG|BAR|MEMBAR|RED|ATOM|CCTL|LDG", o))
    # When every warp is there, one thread releases what all have stored and acquires what others released.
    released = r"(BAR\S* )+MEMBAR\.\S+\.GPU (RED|ATOM)\S+\.STRONG\.GPU"
    acquired = r"(BAR\S* )?(LDG|ATOM)\S+\.STRONG\.GPU CCTL\.IVALL BAR\S*"
    stored, loaded = (r"STG\S* ", r" LDG\S+\.STRONG\.GPU") if variant == "exchange" else ("", "")
    assert re.search(f"{stored}{released} {acquired}{loaded}", memory), memory
    if variant == "exchange" and triton.__version__ == GATED:  # all pieces are asked for before one is used
        together = max(len(run.split()) for run in re.findall(r"(?:LDG\S* ?)+", " ".join(opcodes)))
        assert together >= programs // 4


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("float32", "bfloat16 streamed") else pytest.param(name, marks=pytest.mark.slow)
        for name in PATHS
    ],
)
def test_an_expansion_is_multiplied_as_in_the_kernel(name):
    path = PATHS[name]
    sizes = dict.fromkeys("QAMN", 512 if path.variant in ("prepared", "streamed") else 40)
    sizes |= dict.fromkeys("DV", 300)
    tile = config.choose(path.kernel, "sm_90", path.dtype, sizes)
    x, y = expansion.close_rows(1, tile.blocks["BLOCK_M"], tile.blocks["BLOCK_N"], 300, CPU)
    x, y = x.to(path.dtype), y.to(path.dtype)

    def shipped():
        if path.variant == "streamed":
            sides = prepare(x, y, None, None, path.precision)
            return pairwise_stream.attend_forward(*sides, y, precision=path.precision)
        copies = pairwise.PREPARED // 16 if path.variant == "prepared" else 1  # so that there are enough rows
        rows = (of.repeat(1, copies, 1) for of in (x, y))
        return pairwise.attention_forward(*rows, None, None, precision=path.precision)

    kernel = {"streamed": "expanded_stream", "prepared": "expanded_parts"}.get(path.variant, "expanded")
    measured = binary(kernel, lambda: expansion.tiles_of(path, x, y, tile))
    theirs = binary(path.kernel, shipped)
    instructions, known = (
        set(re.findall(r"wgmma\.mma_async\.\S+", b.asm["ptx"])) for b in (measured, theirs)
    )
    assert instructions and instructions <= known
    tensor_cores = "f16"
    if path.dtype == torch.bfloat16 and path.variant in ("", "streamed"):  # the rows as they are
        tensor_cores = "bf16"
    elif path.dtype == torch.float32 and path.variant == "streamed":
        tensor_cores = "tf32"
    assert all(f".{tensor_cores}.{tensor_cores}" in instruction for instruction in instructions)


def test_waiting_asks_until_all_is_done():
    asked, called = itertools.count(), mock.Mock()
    events = [mock.Mock(query=lambda: True), mock.Mock(query=lambda: next(asked) == 3)]
    waiting.wait("nothing", *events, meanwhile=called)
    assert called.call_count == 3


def test_waiting_for_what_hangs_ends_all_tests(monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(signal, "alarm", alarm := mock.Mock())
    with pytest.raises(pytest.exit.Exception, match=r"a kernel has not ended after .* s: the GPU hangs"):
        waiting.wait("a kernel", mock.Mock(query=lambda: False), seconds=0.01)
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait, daemon=True)
    thread.start()
    with pytest.raises(pytest.exit.Exception, match="a thread has not ended"):
        waiting.join("a thread", [thread], seconds=0.01)
    ended.set()
    waiting.join("a thread", [thread])
    assert alarm.call_count == 2


def test_one_process_of_many_makes_room_for_another(monkeypatch):
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setattr(os, "_exit", left := mock.Mock(side_effect=SystemExit))
    with pytest.raises(SystemExit):
        waiting.wait("a kernel", mock.Mock(query=lambda: False), seconds=0.01)
    assert left.call_args.args == (1,)


def test_tables_of_pages_are_drawn_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"case": "barrier/x", "variant": "barrier", "programs": 1, "warps": 4, "ns": 1.0}
    write_results(tmp_path / "some" / "results.json", describe_machine(CPU), [row])
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# No table\n")
    page.write_text("# Page\n\n<!-- table some/results.json -->\n<!-- end -->\n\nAfter it.\n")
    for said in ("page.md\n", ""):
        result = CliRunner().invoke(app, ["pages", "page.md", "other.md"])
        assert (result.exit_code, result.output) == (0, said)
        drawn = (
            f"<!-- table some/results.json -->\n{markdown(tmp_path / 'some' / 'results.json')}\n<!-- end -->"
        )
        assert page.read_text() == f"# Page\n\n{drawn}\n\nAfter it.\n"
    page.write_text("<!-- table none.json -->\n<!-- end -->")
    result = CliRunner().invoke(app, ["pages", "page.md"])
    assert (result.exit_code, result.output) == (2, "Error: results file none.json does not exist\n")
