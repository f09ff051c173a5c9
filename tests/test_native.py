"""The kernel in C++: built on request, tried out, and never needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import calotype
from calotype import cli
from calotype.errors import UsageError
from calotype.optimize import chosen, native
from calotype.optimize.attention import weigh
from calotype.precision import SMALL

CPU = torch.device("cpu")
BUILDS = native.unusable() is None and native.compiler() is not None  # where not, what is said of it is tested


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def built(cached: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether this machine has the kernel, in a cache of the tests' own."""
    empty(cached, monkeypatch)
    if BUILDS and not native.place().is_file():
        native.build()
    return BUILDS


def empty(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    native.kernel.cache_clear()


@pytest.fixture(autouse=True)
def forget() -> object:
    yield
    native.kernel.cache_clear()


def heads(rows: int, count: int, width: int, seed: int, scale: float) -> Tensor:
    """As linear layers leave them: (B, heads, N, d), in memory (B, N, heads, d)."""
    drawn = torch.randn(2, rows, count * width, generator=torch.Generator().manual_seed(seed))
    return (scale * drawn).bfloat16().unflatten(-1, (count, width)).transpose(1, 2)


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("width", [8, 40, 64, 80, 160, 256])
@pytest.mark.parametrize("lengths", [(128, 128), (200, 77), (1023, 1), (129, 300), (4096, 33)])
@torch.inference_mode()
def test_it_is_attention(built: bool, lengths: tuple[int, int], width: int, scale: float) -> None:
    """As near to float32's as PyTorch's own bfloat16, a fifth further at most."""
    if not built:
        assert native.kernel() is None
        return
    n, length = lengths
    q, k, v = heads(n, 2, width, 0, scale), heads(length, 2, width, 1, scale), heads(length, 2, width, 2, 1.0)
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    ours, theirs = weigh(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert ours.shape == theirs.shape
    if n * length > 2**16:  # with few numbers, chance decides which is nearer
        assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()
    assert torch.allclose(ours.float(), exact, atol=0.02, rtol=0.02)


@torch.inference_mode()
def test_what_overflows_and_what_is_no_number(built: bool) -> None:
    if not built:
        return
    q, k, v = heads(128, 1, 40, 0, 100.0), heads(128, 1, 40, 1, 100.0), heads(128, 1, 40, 2, 1.0)
    assert torch.isfinite(weigh(q, k, v)).all()
    for each in range(3):
        given = [q.clone(), k.clone(), v.clone()]
        given[each][0, 0, 3, 5] = torch.nan
        assert torch.isnan(weigh(*given)).any()
        assert torch.isfinite(weigh(*given)[1]).all()  # the other picture's


def test_what_the_kernel_does_not_compute_is_pytorchs(built: bool) -> None:
    q, k, v = (heads(128, 2, 40, seed, 1.0) for seed in range(3))
    with torch.inference_mode():
        for given in (
            [q.float(), k.float(), v.float()],
            [q[:, :, :100], k, v],
            [q[..., :36], k[..., :36], v[..., :36]],
        ):
            assert torch.equal(weigh(*given), F.scaled_dot_product_attention(*given))
    x = q.clone().requires_grad_()
    weigh(x, k, v).sum().backward()
    assert x.grad is not None


@pytest.mark.filterwarnings("ignore:.* no bfloat16 products:calotype.CalotypeWarning")
def test_pictures_with_it(built: bool, tiny_sd15: Path) -> None:
    """At 128 px a small model's first level has 256 pixels. Undone, it leaves no trace."""
    if not built:
        with pytest.raises(UsageError, match="optimize has 'attention', which is of no use on cpu"):
            calotype.load(tiny_sd15, device="cpu", dtype="bfloat16", optimize=["attention"])
        return
    plain, engine = (
        calotype.load(tiny_sd15, device="cpu", dtype="bfloat16", optimize=steps) for steps in ("none", ["attention"])
    )
    exact = calotype.load(tiny_sd15, device="cpu", dtype="float32", optimize="none")
    request = calotype.Request("a fox", steps=2, seed=1, width=128, height=128, guidance=1.0)
    own, found, wanted = ([*each.stream(request)][-1].x.float() for each in (plain, engine, exact))
    assert not torch.equal(found, own)  # or it was not used
    assert (found - wanted).norm() < 1.5 * (own - wanted).norm()
    engine._optimized.undo()
    assert torch.equal([*engine.stream(request)][-1].x.float(), own)


def test_auto_takes_it_where_it_is_built(built: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ("attention" in [step.name for step in chosen("auto", CPU, torch.bfloat16, SMALL)]) == built
    assert "attention" not in [step.name for step in chosen("auto", CPU, torch.float32, SMALL)]
    empty(tmp_path, monkeypatch)
    assert "attention" not in [step.name for step in chosen("auto", CPU, torch.bfloat16, SMALL)]
    if built:
        with pytest.raises(UsageError, match="its kernel is not built: calotype native build"):
            chosen(["attention"], CPU, torch.bfloat16, SMALL)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    empty(tmp_path, monkeypatch)
    assert cli.main(["native", "show"]) == 2
    assert "the native kernel is not built" in capsys.readouterr().err
    assert cli.main(["native", "build"]) == (0 if BUILDS else 2)
    if BUILDS:
        assert capsys.readouterr().out.strip() == str(native.place())
        assert [path.name for path in native.place().parent.iterdir()] == [native.place().name]
        assert cli.main(["native", "show"]) == 0
        assert cli.main(["native", "remove"]) == 0
        assert not native.place().exists()
    assert cli.main(["native", "paint"]) == 2
    assert "ACTION must be one of build, show, remove, not 'paint'" in capsys.readouterr().err


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty(tmp_path, monkeypatch)
    monkeypatch.setattr(native, "unusable", lambda: None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match=r"no C\+\+ compiler was found"):
        native.build()


def test_a_compiler_that_fails_leaves_its_words_and_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty(tmp_path, monkeypatch)
    monkeypatch.setattr(native, "unusable", lambda: None)
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'it is too old' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(calotype.CalotypeError, match="could not compile the native kernel"):
        native.build()
    log = native.place().with_suffix(".log")
    assert "it is too old" in log.read_text()
    assert list(log.parent.iterdir()) == [log]


def test_a_damaged_kernel_is_as_good_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty(tmp_path, monkeypatch)
    monkeypatch.setattr(native, "unusable", lambda: None)
    native.place().parent.mkdir(parents=True)
    native.place().write_bytes(b"\x7fELF, but no more")
    assert native.kernel() is None
    with pytest.raises(UsageError, match="its kernel is not built"):
        chosen(["attention"], CPU, torch.bfloat16, SMALL)
