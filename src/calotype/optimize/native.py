"""The kernel in C++: compiled where somebody asks for it, kept in the user's cache, and looked for there.

Its file is named after its source and its flags, so that another version's is never taken for it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from calotype.atomic import make_folder, replacing, user_cache
from calotype.errors import CalotypeError, UsageError

SOURCE = Path(__file__).with_name("attention.cpp")
COMPILERS = ("c++", "g++", "clang++")  # $CXX before them
SETS = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16", "amx-tile", "amx-bf16")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", *(f"-m{name}" for name in SETS))


def unusable() -> str | None:
    """Why this processor cannot run it, as a phrase; None where it can."""
    return None if torch.cpu._is_amx_tile_supported() else "its kernel is for processors with AMX"


def place() -> Path:
    """Where the compiled kernel is, or would be."""
    named = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    return user_cache("native") / f"attention-{named}.so"


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first that is found."""
    named = os.environ.get("CXX")
    return next((found for name in ((named,) if named else COMPILERS) if (found := shutil.which(name))), None)


def build() -> Path:
    """Compiles it, and tries it out. Raises UsageError where it is of no use, CalotypeError where it fails."""
    if (why := unusable()) is not None:
        raise UsageError(f"the native kernel is of no use here: {why}", "all works without it")
    found = compiler()
    if found is None:
        raise UsageError("no C++ compiler was found", "install g++, or name one: CXX=/usr/bin/g++-14")
    path = place()
    make_folder(path.parent)
    log = path.with_suffix(".log")
    with replacing(path) as made:
        done = subprocess.run([found, *FLAGS, str(SOURCE), "-o", str(made)], capture_output=True, text=True)
        log.write_text(done.stdout + done.stderr, "utf-8")
        if done.returncode != 0:
            raise CalotypeError(f"{found} could not compile the native kernel", f"what it said is in {log}")
        _check(_opened(made))
    log.unlink()
    kernel.cache_clear()
    return path


@cache
def kernel() -> Any:
    """The compiled kernel as a function, or None where there is none, or it does not run here."""
    path = place()
    if unusable() is not None or not path.is_file():
        return None
    try:
        found = _opened(path)
        _check(found)
    except CalotypeError:
        return None
    return found


def _opened(path: Path) -> Any:
    try:
        found = ctypes.CDLL(str(path)).calotype_attention
    except (OSError, AttributeError) as error:
        raise CalotypeError(f"{path} is damaged ({error})", "build it again: calotype native build") from None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    strides = ctypes.POINTER(number)
    found.argtypes = [*[pointer] * 4, *[number] * 5, *[strides] * 4, ctypes.c_int]
    return found


def attention(function: Any, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(B, heads, N, d) and twice (B, heads, L, d) of bfloat16, d a multiple of 8 -> (B, heads, N, d), in memory
    (B, N, heads, d).
    """
    batch, heads, n, d = queries.shape
    out = queries.new_empty(batch, n, heads, d).transpose(1, 2)
    each = (queries, keys, values, out)
    strides = [(ctypes.c_int64 * 3)(*tensor.stride()[:3]) for tensor in each]
    sizes = (batch, heads, n, keys.shape[2], d)
    code = function(*(tensor.data_ptr() for tensor in each), *sizes, *strides, torch.get_num_threads())
    if code != 0:
        raise CalotypeError(f"the native kernel failed with code {code}", "leave it out: optimize='none'")
    return out


def _check(function: Any) -> None:
    """That it computes attention."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 40, generator=generator).bfloat16() for n in (65, 77, 77))
    ours = attention(function, q, k, v).float()
    theirs = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    if not torch.allclose(ours, theirs, atol=0.02, rtol=0.02):
        raise CalotypeError("the native kernel computes something else here", "leave it out")
