"""What the persistent LSTM kernels compile to: W_hh stays on chip, and nothing is read before it is there."""

import re

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("rich")

from gatematch.bench.kernels import ARCHITECTURES, compiled, faults, kernel_rows  # noqa: E402
from gatematch.bench.launches import LAUNCHES, Sample  # noqa: E402
from gatematch.kernels import config, lstm_persistent  # noqa: E402
from gatematch.kernels.cooperative import fitted  # noqa: E402
from gatematch.kernels.recurrence import padded  # noqa: E402

H = 512
# How often the programs of a step wait for others. Backward they also read each other's partial sums.
KERNELS = {"lstm_persistent_fwd": 1, "lstm_persistent_bwd": 2}
PARTIAL_SUMS = 4


@pytest.fixture(scope="module", params=KERNELS)
def kernel(request):
    return request.param


@pytest.fixture(scope="module")
def binary(kernel):
    launch = LAUNCHES[kernel](Sample(torch.bfloat16, {"H": H, "B": 16}))
    (found,) = compiled(kernel, "sm_90", launch)
    return found


@pytest.fixture(scope="module")
def options(kernel):
    tile = config.choose(kernel, "sm_90", torch.bfloat16, {"H": H, "B": 16})
    return fitted(tile, H, "tf32", "sm_90", backward=kernel.endswith("bwd"))


def parts(ttgir):
    """The lines before the loop over the steps, and those in it."""
    lines = ttgir.splitlines()
    (start,) = (n for n, line in enumerate(lines) if re.match(r"    %\S+ = scf\.for ", line))
    end = next(n for n in range(start, len(lines)) if lines[n].startswith("    }"))
    return lines[:start], lines[start : end + 1]


def of_weights(lines, derived):
    """The loads of W and its allocations in shared memory; `derived` collects what comes of its pointers."""
    loads, allocations = 0, 0
    for line in lines:
        found = re.match(r"\s*(%\w+)(?::\d+)? = (\S+)(.*)", line)
        if found is None or "dot" in found[2]:
            continue
        names = set(re.findall(r"%\w+", found[3]))
        if any(name in derived or re.match(r"%w_(reverse_)?ptr", name) for name in names):
            derived.add(found[1])
            loads += found[2] == "tt.load"
            allocations += found[2] == "ttg.local_alloc"
    return loads, allocations


def test_the_weights_are_put_in_shared_memory_once(binary, options):
    before, loop = parts(binary.asm["ttgir"])
    derived = set()
    chunks = options["RESIDENT"] // options["BLOCK_K"]
    assert of_weights(before, derived) == (chunks, chunks)
    assert of_weights(loop, derived) == (0, 0)
    # Negative control: a load of W moved into the loop is seen.
    (*_, load) = (line for line in before if " = tt.load " in line and of_weights([line], set(derived))[0])
    assert of_weights([load, *loop], derived) == (1, 0)


# What matters of a text for the order, as Triton 3.6 to 3.9 spell it: first pattern that matches a line.
TTGIR = {
    "barrier": r"(gpu|ttg)\.barrier",
    "release": r"tt\.atomic_rmw add, release, gpu",
    "acquire": r"tt\.atomic_(rmw add,|poll) acquire, gpu",
    "exchange": r"tt\.load .*(cacheModifier|cache_modifier) = cg",
    "store": r"tt\.store ",
}
PTX = {
    "barrier": r"bar\.sync",
    "release": r"(atom|red)\.global\.gpu\.release\.add",
    "acquire": r"(ld|atom)\.global\.gpu\.acquire|fence\.acquire\.gpu",
    "exchange": r"ld\.global\.cg",
    "store": r"st\.global",
}


def events(lines, patterns):
    found = (next((name for name in patterns if re.search(patterns[name], line)), None) for line in lines)
    return [name for name in found if name]


def as_run(ptx):
    """The lines with those of the loop over the steps in their order: its end may lie in front of its head,
    where a jump leads over it, and then a jump out of the loop ends it."""
    lines = ptx.splitlines()
    (head,) = (n for n, line in enumerate(lines) if "=>This Loop Header: Depth=1" in line)
    label = re.escape(lines[head].split(":")[0])
    for over in range(head):
        if re.search(rf"bra\.uni\s+{label};", lines[over]):
            after = re.search(r"bra\s+(\S+);", lines[head - 1])[1]
            end = next(n for n, line in enumerate(lines) if line.startswith(f"{after}:"))
            return lines[:over] + lines[head:end] + lines[over:head] + lines[end:]
    return lines


def disorder(found):
    """What is wrong with an order of events."""
    wrong, stored, acquired = [], False, False
    for event in found:
        if event == "store":
            stored = True
        elif event == "barrier":
            stored = False
        elif event == "release":
            if stored:
                wrong.append("a release before all warps have stored")
            acquired = False
        elif event == "acquire":
            acquired = True
        elif not acquired:
            wrong.append("a load of what others may not have stored")
    return wrong


@pytest.mark.parametrize("level", ["ttgir", "ptx"])
def test_nothing_is_read_before_all_have_stored_it(binary, kernel, options, level):
    if level == "ttgir":
        before, loop = parts(binary.asm[level])
        found = events(before + loop + loop, TTGIR)
        chunks = options["RESIDENT"] // options["BLOCK_K"]
        assert found.count("exchange") == 2 * (chunks + PARTIAL_SUMS * kernel.endswith("bwd"))
    else:
        found = events(as_run(binary.asm[level]), PTX)
    syncs = [event for event in found if event in ("release", "acquire")]
    loops = 2 if level == "ttgir" else 1
    rounds = loops * KERNELS[kernel] + (kernel == "lstm_persistent_fwd")  # it also shares h_0
    assert syncs == ["release", "acquire"] * rounds
    assert "exchange" in found
    assert disorder(found) == []
    # Negative controls: the last read moved to before the acquire, or the barrier (or two) left out.
    read = len(found) - 1 - found[::-1].index("exchange")
    acquire = max(n for n in range(read) if found[n] == "acquire")
    early = [*found[:acquire], "exchange", *found[acquire:read], *found[read + 1 :]]
    assert disorder(early) == ["a load of what others may not have stored"]
    release = found.index("release")
    stores = max(n for n in range(release) if found[n] != "barrier") + 1
    assert "a release before all warps have stored" in disorder(found[:stores] + found[release:])


def test_nothing_is_moved_between_layouts_before_the_release(binary, kernel):
    """In backward all is in the layout of memory; in forward what is split from the product moves, and h."""
    _, loop = parts(binary.asm["ttgir"])
    release = next(n for n, line in enumerate(loop) if "atomic_rmw" in line)
    moves = sum("ttg.convert_layout" in line for line in loop[:release])
    assert moves == 0 if kernel.endswith("bwd") else moves <= 6


def test_chunks_are_not_copied_asynchronously(binary):
    assert "cp.async" not in binary.asm["ptx"]
    assert "async_copy" not in binary.asm["ttgir"]


def test_all_gates_are_one_product(binary, options):
    """Backward it is one gate, of four times as many units."""
    products = re.findall(r"tt\.dot .*-> tensor<(\w+)>", binary.asm["ttir"])
    assert products == ["64x16xf32"] * (options["RESIDENT"] // options["BLOCK_K"])
    assert "wgmma.mma_async" in binary.asm["ptx"]


def test_the_launch_is_cooperative(binary):
    assert binary.metadata.launch_cooperative_grid


def test_a_hidden_size_that_is_no_multiple_of_16_is_refused():
    z, state = torch.randn(1, 1, 1, 4 * 24), torch.randn(1, 1, 24)
    with pytest.raises(ValueError, match="multiple of 16; got 24"):
        lstm_persistent.forward(z, [torch.randn(96, 24)], state, state, None, precision="tf32", save=False)


@pytest.mark.parametrize("backward", [False, True])
def test_serves(backward):
    def serves(hidden_size, dtype, arch, processors, precision="float32"):
        return lstm_persistent.serves(hidden_size, dtype, precision, arch, processors, backward)

    assert serves(1024, torch.bfloat16, "sm_90", 64)
    assert not serves(1024, torch.bfloat16, "sm_90", 63)  # not all programs would run at once
    assert serves(2048, torch.float32, "sm_90", 132)
    assert not serves(2049, torch.float32, "sm_90", 10**6)
    assert not serves(2048, torch.float16, "sm_80", 108)
    assert not serves(128, torch.float16, "gfx942", 304)
    # 99 KB of shared memory.
    assert serves(512, torch.float16, "sm_86", 84)
    assert not serves(513, torch.float16, "sm_86", 84)
    assert serves(256, torch.float32, "sm_120", 84, "tf32")
    assert not serves(256, torch.float32, "sm_120", 84, "float32")


# Sizes that weights are rounded up to, for which a configuration listed for another may be chosen.
SIZES = sorted({padded(H) for H in range(1, 2049)})


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if not arch.startswith("gfx")])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.bfloat16, "float32"), (torch.float32, "tf32"), (torch.float32, "float32")],
)
def test_what_is_served_compiles_without_faults(kernel, arch, dtype, precision):
    if triton.__version__ != "3.6.0":
        pytest.skip("registers are counted in Triton 3.6.0 alone")
    found = {}
    for n in torch.randperm(len(SIZES))[:4].tolist():
        size, B, training = SIZES[n], (16, 64)[torch.randint(2, ())], torch.rand(()).item() < 0.5
        assert lstm_persistent.serves(size, dtype, precision, arch, 132, kernel.endswith("bwd"))
        shape = {"H": size, "B": B}
        sample = Sample(dtype, shape, precision=precision, training=training, with_lengths=training)
        tile = config.choose(kernel, arch, dtype, shape)
        found[str(sample)] = [faults(row) for row in kernel_rows(kernel, arch, sample, tile)]
    assert not {case: wrong for case, wrong in found.items() if any(wrong)}
