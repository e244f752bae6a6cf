"""`gatematch-bench gpu` without a GPU: its stages are small programs, and compute-sanitizer is a script."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

from gatematch.bench import __main__ as command
from gatematch.bench import console, gpu, results, sanitizer
from gatematch.bench.cases import GPU_CASES
from gatematch.bench.kernels import compiled
from gatematch.bench.launches import LAUNCHES, Sample
from gatematch.kernels import config

CPU = torch.device("cpu")
TESTS = Path(__file__).with_name("test_gpu.py")
# Programs of stages: one writes results, the other what pytest would.
ROWS = """import sys; open(sys.argv[1], "w").write('{"meta": {}, "rows": [{"case": "x"}, {"case": "y"}]}')"""
JUNIT = """import sys; open(sys.argv[2], "w").write('<testsuites><testsuite>%s</testsuite></testsuites>')"""
GOOD = '<testcase name="test_a[1]"/><testcase name="test_a[2]"/>'
BAD = '<testcase name="test_c"><failure/></testcase><testcase name="test_d"><error/></testcase>'
SKIPPED = '<testcase name="test_b"><skipped/></testcase>'


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Makes stages of programs: they get the names of their files of results and of tests."""

    def make(**programs):
        made = {}
        for name, program in programs.items():
            path = tmp_path / f"{name}.py"
            path.write_text(program)
            made[name] = ("-I", "-S", str(path), "{results}", "{junit}")
        monkeypatch.setattr(gpu, "STAGES", made)
        return tmp_path / "gpu.json"

    return make


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(console, "usable_device", lambda name: CPU)


def invoke(*arguments):
    return CliRunner().invoke(command.app, ["gpu", *map(str, arguments)])


def test_a_dry_run(on_cpu, stages):
    """All that can become of a stage: in the table, in the results file and as an exit code."""
    many = BAD + "".join(f'<testcase name="t{n}"><error/></testcase>' for n in range(6))
    lacking = f"print('no such tool'); raise SystemExit({sanitizer.UNAVAILABLE})"
    path = stages(
        tests=f"{JUNIT % (GOOD + SKIPPED)}; print('3 in one second')",
        failing=f"{JUNIT % (GOOD + many)}; sys.exit(1)",
        rows=f"{ROWS}; print('table'); print('results: x.json')",
        sentence=f"{ROWS}; print('results: x.json'); print('all 2 within their bounds')",
        bad=f"{ROWS}; print('table'); sys.exit('1 of 2 are past their bound')",
        lacking=lacking,
        crashing="raise RuntimeError('device lost')",
        killed="import os; print('before', flush=True); os.kill(os.getpid(), 11)",
        silent="print('done')",
        skipping=f"{JUNIT % SKIPPED}; print('1 skipped in one second')",
    )
    result = invoke("--json", path, "--tests", TESTS)
    assert result.exit_code == 1 and result.output.endswith(f"\nresults: {path}\n"), result.output
    assert "== rows of 10 stages\ntable\nresults: x.json\n==" in result.output
    assert path.with_name("gpu-rows.log").read_text() == "table\nresults: x.json\n"
    table = [line.split(" | ")[:3] for line in result.output.splitlines() if line.startswith("| `")]
    assert table == [
        ["| `tests`", "passed", "2 passed, 1 skipped"],
        ["| `failing`", "failed", "2 passed, 8 failed: test_c, test_d, t0, t1, t2, and 3 more"],
        ["| `rows`", "passed", "2 rows"],
        ["| `sentence`", "passed", "all 2 within their bounds"],
        ["| `bad`", "failed", "2 rows: exit code 1: 1 of 2 are past their bound"],
        ["| `lacking`", "not available", "no such tool"],
        ["| `crashing`", "failed", "exit code 1: RuntimeError: device lost"],
        ["| `killed`", "failed", "ended by SIGSEGV: before"],
        ["| `silent`", "failed", "exit code 0: done"],
        ["| `skipping`", "failed", "1 skipped: exit code 0: 1 skipped in one second"],
    ]
    written = results.read_results(path)
    assert written["meta"]["arch"] == "sm_90" and written["meta"]["torch"] == torch.__version__
    first = [(row["stage"], row["case"]) for row in written["rows"]][:5]
    assert first == [
        ("tests", "gpu/tests"),
        ("failing", "gpu/failing"),
        ("rows", "gpu/rows"),
        ("rows", "x"),
        ("rows", "y"),
    ]
    assert written["rows"][1]["failed_tests"][:3] == ["test_c", "test_d", "t0"]
    assert invoke("--json", path, "--stage", "lacking", "--stage", "rows", "--tests", TESTS).exit_code == 0


def run(path, *names, limit=60):
    return gpu.run_gpu(CPU, names, path, limit, TESTS)


def test_the_file_is_written_after_every_stage_and_by_later_calls(stages, tmp_path, monkeypatch):
    path = stages(a=ROWS, b=f"print(open({str(tmp_path / 'gpu.json')!r}).read()); {ROWS}", c=ROWS)
    run(path)
    seen = json.loads((tmp_path / "gpu-b.log").read_text())
    assert [row["case"] for row in seen["rows"]] == ["gpu/a", "x", "y"]
    before = results.read_results(path)["rows"]
    (tmp_path / "c.py").write_text("raise SystemExit(3)")
    assert [row["stage"] for row in run(path, "c")] == ["c"]
    *others, last = results.read_results(path)["rows"]
    assert others == before[:6] and last["status"] == "failed" and "rows" not in last
    another = results.describe_machine(CPU) | {"commit": "another"}
    monkeypatch.setattr(gpu, "describe_machine", lambda device: another)
    run(path, "b")
    assert {row["stage"] for row in results.read_results(path)["rows"]} == {"b"}


HANGING = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
alive = open({pipe!r}, "wb", buffering=0)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=[alive.fileno()])
alive.write(b"started")
time.sleep(600)
"""


SLOW = f"""
import time
try:
    time.sleep(600)
except KeyboardInterrupt:
    {ROWS}
    raise
"""


def test_stages_that_take_too_long_are_ended(stages, tmp_path, monkeypatch):
    """One that hangs with all that it started; one that ends when it is asked to keeps what it has."""
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    monkeypatch.setattr(gpu, "TOGETHER", ("hanging", "slow"))
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    path = stages(hanging=HANGING.format(pipe=pipe), slow=SLOW, after=ROWS)
    hanging, slow, after = run(path, limit=6)  # both must have begun by then
    assert (hanging["status"], hanging["reason"]) == ("timed out", "stopped after 6 s")
    assert (slow["status"], slow["what"], slow["rows"]) == ("timed out", "2 rows", 2)
    assert after["status"] == "passed"
    assert [row["stage"] for row in results.read_results(path)["rows"]] == [
        "hanging",
        *["slow"] * 3,
        *["after"] * 3,
    ]
    assert os.read(reader, 100) == b"started"
    assert os.read(reader, 100) == b"", "nobody holds the other end"
    os.close(reader)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_being_told_to_end_ends_the_stages_too(number, stages, tmp_path, monkeypatch):
    before = signal.getsignal(number)
    monkeypatch.setattr(gpu, "TOGETHER", ("one", "other"))
    waiting_on = "import os, time; open({path!r}, 'w').close(); time.sleep(600)"
    begun = [tmp_path / "one.begun", tmp_path / "other.begun"]
    one, other = (waiting_on.format(path=str(path)) for path in begun)

    def tell():
        while not all(path.exists() for path in begun):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=tell).start()
    began = time.monotonic()
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    with pytest.raises(SystemExit) as ended:
        run(stages(one=one, other=other, after=ROWS), limit=600)
    assert ended.value.code == 128 + number and signal.getsignal(number) == before
    assert time.monotonic() - began < 60 and not (tmp_path / "gpu-after.log").exists()


def test_stages_that_time_nothing_run_side_by_side(stages, tmp_path, monkeypatch):
    """Each of the two waits for the other to have begun; the third begins when both have ended."""
    monkeypatch.setattr(gpu, "TOGETHER", ("a", "c"))
    met = f"""
import pathlib, sys, time
here = pathlib.Path({str(tmp_path)!r})
(here / (sys.argv[0] + ".begun")).touch()
while len(list(here.glob("*.begun"))) < 2: time.sleep(0.01)
{ROWS}
(here / (sys.argv[0] + ".ended")).touch()
"""
    after = f"import pathlib; assert len(list(pathlib.Path({str(tmp_path)!r}).glob('*.ended'))) == 2; {ROWS}"
    rows = run(stages(a=met, b=after, c=met))
    assert [(row["stage"], row["status"]) for row in rows] == [(name, "passed") for name in "abc"]
    cases = [row["case"] for row in results.read_results(tmp_path / "gpu.json")["rows"]]
    assert cases == ["gpu/a", "x", "y", "gpu/b", "x", "y", "gpu/c", "x", "y"]


# --- the stages themselves ---


def test_nothing_is_compiled_ahead_for_an_architecture_without_a_list(tmp_path):
    (row,) = gpu.run_stage("compile", "sm_103", tmp_path / "gpu.json", 60, TESTS, threading.Event())
    assert row["status"] == "not available" and "sm_90" in row["reason"] and "this is sm_103" in row["reason"]
    assert not list(tmp_path.iterdir())


def test_stages_are_commands_that_exist():
    commands = typer.main.get_command(command.app).commands
    for _, module, *arguments in gpu.STAGES.values():
        if module == "gatematch.bench":
            name, *options = (word.format(arch="sm_90", results="x.json") for word in arguments)
            assert commands[name].make_context(name, options).params["json"] == Path("x.json")


def test_every_case_of_speed_is_in_one_stage():
    speed = [words for name, words in gpu.STAGES.items() if name.startswith("speed-")]
    filters = [words[words.index("--filter") + 1] for words in speed]
    for case in GPU_CASES:
        assert sum(re.search(pattern, case.label) is not None for pattern in filters) == 1


# In the place of torch, beside conftest.py: a device that is lost for a process when a test loses it.
TORCH = """
class cuda:
    is_initialized = is_available = lambda: True
    def synchronize():
        if lost:
            raise RuntimeError("an illegal memory access was encountered")
lost, manual_seed = False, print
"""
LOSING = """
import pytest, time, torch
pytestmark = pytest.mark.gpu
def test_wrong(): assert False
def test_other(): pytest.skip("not here")
@pytest.mark.parametrize("n", range(20))
def test_some(n):
    torch.lost = torch.lost or n == 3
    torch.cuda.synchronize()
@pytest.mark.parametrize("n", range(3))
def test_gives_the_same_bits(n):
    time.sleep(1.0 if n == 0 else 0.0)
    torch.lost = n == 1
    torch.cuda.synchronize()
"""


def test_a_process_that_loses_the_device_takes_no_other_tests_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PATIENCE", 0.5)
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest")  # a second for each process
    (tmp_path / "conftest.py").write_text(TESTS.with_name("conftest.py").read_text())
    (tmp_path / "torch.py").write_text(TORCH)
    path = tmp_path / "test_losing.py"
    path.write_text(LOSING)
    (others,) = gpu.run_stage("tests", "sm_90", tmp_path / "gpu.json", 120, path, threading.Event())
    (same,) = gpu.run_stage("determinism", "sm_90", tmp_path / "gpu.json", 120, path, threading.Event())
    log = (tmp_path / "gpu-tests.log").read_text()
    assert others["what"] == "19 passed, 2 failed, 1 skipped", log
    assert sorted(others["failed_tests"]) == ["test_some[3]", "test_wrong"], log
    assert (same["status"], same["passed"], same["failed"]) == ("failed", 1, 1)
    log = (tmp_path / "gpu-determinism.log").read_text()
    assert "the CUDA device is lost: an illegal" in log
    assert "in test_gives_the_same_bits" in log, "where it is after so long"


WITHOUT = """
import importlib, sys
for name in "scipy matplotlib expecttest hypothesis keras onnx bm25s chatterbot_corpus yaml".split():
    sys.modules[name] = None
for name in "gpu kernels sanitizer check expansion barrier ceilings speed speed_report tables".split():
    importlib.import_module(f"gatematch.bench.{name}")
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", sys.argv[1]]))
"""


def test_the_stages_import_only_what_such_a_machine_has():
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT, TESTS],
        cwd=TESTS.parents[1],
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0 and "::test_lstm_cell" in child.stdout, child.stdout + child.stderr


# --- the command ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_machine_without_cuda_is_told_in_a_sentence(tmp_path):
    result = invoke("--json", tmp_path / "gpu.json")
    assert result.exit_code == 2 and "device must be one that torch can use here" in result.output
    assert not list(tmp_path.iterdir())


def test_wrong_options_are_told_without_a_gpu(tmp_path):
    for arguments, words in (
        (("--stage", "test"), "--stage must be of tests, check, expansion"),
        (("--tests", tmp_path / "none.py"), "--tests must be a file of tests"),
        (("--json", tmp_path), "--json must be a file"),
    ):
        result = invoke("--json", tmp_path / "gpu.json", *arguments)
        assert result.exit_code == 2 and words in result.output, result.output
    assert not list(tmp_path.iterdir())


def test_the_commit_is_named_where_there_is_no_repository(tmp_path, monkeypatch):
    def commit():
        return results.describe_machine(CPU)["commit"]

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text('name = "gatematch"')
    monkeypatch.delenv("GATEMATCH_COMMIT", raising=False)
    assert commit() is None
    monkeypatch.setenv("GATEMATCH_COMMIT", "0123456789ab of an archive")
    assert commit() == "0123456789ab of an archive"
    git = ["git", "-c", "user.name=x", "-c", "user.email=x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    assert re.fullmatch(r"[0-9a-f]{12}\+", commit())


# --- compute-sanitizer ---

SEES = {
    "memcheck": """\
========= Invalid __global__ write of size 4 bytes
=========     at planted_store+0x70 in sanitizer.py:17
=========
========= ERROR SUMMARY: 1 error
""",
    "racecheck": """\
========= Error: Race reported between Write access at planted_race+0xc0 in sanitizer.py:25
=========     and Read access at planted_race+0xd0 in sanitizer.py:25 [508 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
""",
}
CLEAN = {
    "memcheck": "========= ERROR SUMMARY: 0 errors\n",
    "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
}
FINDS = {
    "memcheck": """\
========= Invalid __global__ read of size 16 bytes
=========     at pairwise_fwd+0xec in pairwise.py
=========
========= ERROR SUMMARY: 12 errors
""",
    "racecheck": """\
========= Warning: Race reported between Write access at lstm_step_fwd+0xb0
=========     and Read access at lstm_step_fwd+0xd0 [9 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)
""",
}
CRASH, LOST = "RuntimeError: out of memory\n", "========= Error: connection lost\n"
REFUSES = "========= Error: Device not supported.\n=========\n========= ERROR SUMMARY: 2 errors\n"
NONE = sanitizer.UNAVAILABLE


@pytest.mark.parametrize(
    ("planted", "kernels", "ends", "code", "said"),
    [
        (SEES, CLEAN, 0, 0, "memcheck 0 errors, racecheck 0 hazards"),
        (
            SEES, FINDS, 0, 1,
            "memcheck 12 errors: Invalid __global__ read of size 16 bytes at pairwise_fwd+0xec in pairwise.py"
            ", racecheck 1 hazards: Warning: Race reported between Write access at lstm_step_fwd+0xb0 "
            "and Read access at lstm_step_fwd+0xd0 [9 hazards]",
        ),
        (
            SEES, {"memcheck": CLEAN["memcheck"] + CRASH, "racecheck": LOST}, 1, 1,
            "memcheck 0 errors: exit code 1: RuntimeError: out of memory, "
            "racecheck ? hazards: exit code 1: Error: connection lost",
        ),
        # What sees no planted error says nothing of the kernels.
        (dict.fromkeys(SEES, REFUSES), CLEAN, 0, NONE, "a planted error: Error: Device not supported."),
        (CLEAN, CLEAN, 0, NONE, "does not see a planted error: ERROR SUMMARY: 0 errors"),
        (dict.fromkeys(SEES, ""), CLEAN, 0, NONE, "does not see a planted error: exit code 0"),
        # One tool is enough.
        ({**SEES, "racecheck": ""}, CLEAN, 0, 0, "memcheck 0 errors, racecheck not available"),
    ],
    ids=["clean", "finds", "crashes", "refuses", "blind", "silent", "one"],
)  # fmt: skip
def test_a_sanitizer(planted, kernels, ends, code, said, tmp_path, monkeypatch, capfd):
    """The tool is a script that says what it is told to of the planted errors, and of the kernels."""
    for program, words in (("planted", planted), ("kernels", kernels)):
        for tool, output in words.items():
            (tmp_path / f"{tool}-{program}").write_text("========= COMPUTE-SANITIZER\n" + output)
    script = tmp_path / "compute-sanitizer"
    script.write_text(f"""#!/bin/sh
cd {tmp_path}
case "$*" in
    --version) printf 'NVIDIA (R) Compute Sanitizer\\nVersion 2025.3.1.0\\n' ;;
    *"-m gatematch.bench.sanitizer planted $2") cat "$2-planted" ;;
    *"-m gatematch.bench.sanitizer kernels") cat "$2-kernels"; echo "$*" >"$2-arguments"; exit {ends} ;;
esac
""")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert sanitizer.run_sanitizer(tmp_path / "sanitizer.json", CPU) == code
    assert said in capfd.readouterr().out.splitlines()[-1]
    rows = results.read_results(tmp_path / "sanitizer.json")["rows"]
    assert [row["version"] for row in rows] == ["Version 2025.3.1.0"] * 2
    if planted is SEES and kernels is CLEAN:
        found = {"status": "passed", "hazards": 0, "errors": 0, "warnings": 0}
        assert rows[1] == {"case": "sanitizer/racecheck", **found, "version": "Version 2025.3.1.0"}
        memcheck, racecheck = ((tmp_path / f"{tool}-arguments").read_text() for tool in SEES)
        assert "--padding" in memcheck and "--padding" not in racecheck


def test_no_sanitizer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sanitizer, "TOOLKIT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    code = sanitizer.run_sanitizer(tmp_path / "sanitizer.json", CPU)
    assert code == sanitizer.UNAVAILABLE and not list(tmp_path.iterdir())
    assert capsys.readouterr().out == f"compute-sanitizer is not on the PATH, in {tmp_path} or beside nvcc\n"
    nvcc = tmp_path / "toolkit" / "nvcc"
    nvcc.parent.mkdir()
    for path in (nvcc, nvcc.with_name("compute-sanitizer")):
        path.touch(mode=0o755)
    (tmp_path / "nvcc").symlink_to(nvcc)
    assert sanitizer.find() == str(nvcc.with_name("compute-sanitizer"))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_kernel_is_watched(arch, monkeypatch):
    launched = {}

    def run(self, *args, **kwargs):
        launched.setdefault(self.fn.__name__, set()).add(sample.dtype)

    monkeypatch.setattr(JITFunction, "run", run)
    for kernel, sample in sanitizer.cases(arch, "cpu"):
        sanitizer.launch((kernel, sample))
    assert launched.keys() == LAUNCHES.keys() | {"pairwise_centre"}  # which has no configuration
    assert all(dtypes == set(sanitizer.DTYPES) for dtypes in launched.values())
    watched = [word.removeprefix("kns=") for word in sanitizer.KERNELS[1::2]]
    names = [*launched, "planted_store", "planted_race"]
    assert all(any(part in name for part in watched) for name in names)


def test_the_programs_that_are_watched(monkeypatch):
    called = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: called.append("waited"))
    monkeypatch.setattr(sanitizer, "plant", lambda *tool: called.append(tool))
    monkeypatch.setattr(
        sanitizer, "cases", lambda arch, device: [("kernel", Sample(torch.float16, {}, device=device))]
    )
    monkeypatch.setattr(sanitizer, "launch", lambda case: called.append(case[1].device))
    monkeypatch.setattr(config, "architecture", lambda device: "sm_90")
    assert sanitizer.main("planted", "memcheck") == sanitizer.main("kernels") == 0
    assert called == [("memcheck", "cuda:1"), "waited", "cuda:1", "waited"]


def test_planted_errors_compile_to_what_they_are():
    (store,) = compiled("planted_store", "sm_90", lambda: sanitizer.plant("memcheck", "cpu"))
    (race,) = compiled("planted_race", "sm_90", lambda: sanitizer.plant("racecheck", "cpu"))
    assert re.search(r"add\.s64\s.*, 4096;.*st\.global", store.asm["ptx"], re.S), store.asm["ptx"]
    assert re.search(r"st\.volatile\.shared.*ld\.volatile\.shared", race.asm["ptx"], re.S)
    assert "bar.sync" not in race.asm["ptx"] and race.metadata.num_warps > 1
