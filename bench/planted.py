"""Errors that compute-sanitizer must see before its silence means anything: python -m gatematch.bench.planted

Takes the tool as its argument, and makes the error that this tool is for.
"""

import sys

import torch
import triton
import triton.language as tl


@triton.jit
def planted_store(y_ptr):
    """Stores 4096 bytes past the first element."""
    tl.store(y_ptr + 1024, 1)


@triton.jit
def planted_race(x_ptr, y_ptr, THREADS: tl.constexpr):
    """All threads write one word of shared memory and read it, and do not wait in between."""
    i = tl.arange(0, THREADS)
    read = tl.inline_asm_elementwise(
        """{
        .shared .align 4 .b32 planted;
        st.volatile.shared.b32 [planted], $1;
        ld.volatile.shared.b32 $0, [planted];
        }""",
        "=r,r",
        [tl.load(x_ptr + i)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(y_ptr + i, read)


def memcheck(device: str) -> None:
    planted_store[(1,)](torch.zeros(1, dtype=torch.int32, device=device))


def racecheck(device: str) -> None:
    x = torch.arange(128, dtype=torch.int32, device=device)
    planted_race[(1,)](x, torch.empty_like(x), THREADS=128, num_warps=4)


ERRORS = {"memcheck": memcheck, "racecheck": racecheck}


if __name__ == "__main__":
    ERRORS[sys.argv[1]]("cuda")
    torch.cuda.synchronize()
