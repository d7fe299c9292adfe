"""bench.paper: what a kernel takes follows from the compiler's report, without a device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install 'w2s-fast[test]'")

import bench.paper
from bench.aot import SMS, Compilation
from bench.paper_cases import cases
from bench.paper_estimate import Machine, Programs, Work, estimate, resident
from w2s_fast.kernels.library import BACKEND

MACHINE = Machine(copy=1e12, product=1e14, launch=2e-6, wait=1e-6, exchange=1e-7)


class Reported(Compilation):
    """A kernel of which the compiler said this."""

    def __init__(
        self,
        registers: int = 32,
        num_warps: int = 4,
        shared: int = 0,
        programs: int = 1,
        num_stages: int = 3,
        tensor_columns: int = 0,
        ptx: str = "",
    ) -> None:
        super().__init__(
            "kernel", 90, (programs,), num_warps, num_stages, shared, tensor_columns, ptx, b""
        )
        self.__dict__["resources"] = {"REG": registers, "STACK": 0, "LOCAL": 0, "SHARED": 0}


@pytest.mark.parametrize(
    ("report", "programs"),
    [
        ({"registers": 32}, 16),  # 64 warps
        ({"registers": 38}, 12),  # in units of 8 registers a thread: 40
        ({"registers": 64}, 8),
        ({"registers": 255}, 2),
        ({"registers": 179, "num_warps": 8}, 1),
        ({"registers": 32, "num_warps": 1}, 32),  # programs
        ({"registers": 32, "shared": 114 * 1024 - 1024}, 2),  # and 1 KiB for each
        ({"registers": 32, "shared": 114 * 1024 - 1023}, 1),
        ({"registers": 32, "tensor_columns": 128}, 4),
    ],
)
def test_a_multiprocessor_holds_what_fits(report: dict[str, int], programs: int) -> None:
    assert resident(Reported(**report)) == programs


def test_loads_are_as_wide_as_those_that_bring_much() -> None:
    one = "ld.global.b64 %rd1, [ %rd2 + 0 ];"
    narrow = "@%p1 ld.global.b16 { %rs1 }, [ %rd3 + 0 ];"
    wide = "ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd3 + 0 ];"
    copied = "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;"
    assert Reported(ptx="\n".join([one, *[narrow] * 16])).load_bytes == 2
    assert Reported(ptx="\n".join([one, *[narrow] * 16, *[wide] * 2])).load_bytes == 16
    assert Reported(ptx="\n".join([one, copied])).load_bytes == 16
    assert Reported().load_bytes == 0


def seconds(moved: int, each: Programs, flop: int = 0, **report: int) -> float:
    return estimate(Reported(**report), Work(moved, [each], flop), MACHINE).seconds


def test_a_launch_takes_the_longer_of_its_limit_and_its_latency() -> None:
    sms = SMS[90]
    assert seconds(10**9, Programs(waits=3), programs=sms) == pytest.approx(1e-3 + 2e-6)
    assert seconds(0, Programs(waits=3), flop=10**11, programs=sms) == pytest.approx(1e-3 + 2e-6)
    assert seconds(10**3, Programs(waits=3, exchanges=5), programs=sms) == pytest.approx(5.5e-6)
    # Loads of a pipelined loop are under way for two of three stages.
    assert seconds(0, Programs(waits=3, trips=7), programs=sms) == pytest.approx(9e-6)


def test_programs_that_do_not_fit_at_once_follow_in_waves() -> None:
    at_once = 8 * SMS[90]
    full = {"registers": 64, "programs": at_once}
    assert seconds(0, Programs(waits=3), **full) == pytest.approx(5e-6)
    assert seconds(0, Programs(waits=3), **{**full, "programs": at_once + 1}) == pytest.approx(8e-6)
    # One program more than there are multiprocessors, and one of these has two.
    uneven = seconds(10**9, Programs(waits=3), programs=SMS[90] + 1)
    assert uneven == pytest.approx(2e-3 * SMS[90] / (SMS[90] + 1) + 2e-6)


def test_programs_without_work_cost_a_look() -> None:
    report = Reported(registers=64, programs=8 * SMS[90] + 4)
    found = estimate(report, Work(0, [Programs(waits=3, count=4)]), MACHINE)
    assert found.idle == 8 * SMS[90]
    assert found.seconds == pytest.approx(2e-6 + 3e-6 + 1e-6)


@pytest.mark.skipif(BACKEND != "auto", reason="kernels are not compiled")
def test_a_kernel_is_shown_with_its_price(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "paper.json"
    assert bench.paper.main(["--only", "write_kv", "--copy", "2", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["machine"]["copy"] == 2e12 and report["triton"]
    moved = 2 * 2 * 16 * 8 * 128 * 2  # keys and values, read and written: 16 x 8 x 128 in 16 bits
    for arch, (total, row) in zip((90, 100), (report["rows"][:2], report["rows"][2:]), strict=True):
        assert (row["arch"], row["kernel"], total["kernel"]) == (arch, "_scatter", "")
        assert row["programs"] == 16 and row["idle"] == 0 and row["spilled"] == 0
        assert 8 <= row["registers"] <= 64 and row["resident"] >= 8
        assert row["moved"] == total["moved"] == moved
        assert row["limit_us"] == round(1e6 * moved / 2e12, 3)
        assert total["us"] == row["us"] > 2
        assert total["share"] == pytest.approx(total["limit_us"] / total["us"], abs=1e-3)
    printed = capsys.readouterr().out
    assert "write_kv 8B, 16 tokens" in printed and "_scatter" in printed


def test_every_operator_is_on_paper() -> None:
    found = {case.operator for case in cases()}
    assert found | {"copy_pages"} == {  # which nvcc builds, where there is one
        "choose_beta",
        "copy_pages",
        "fuse_logits",
        "linear_logprob",
        "paged_attention",
        "rms_norm",
        "rotate",
        "sample_tokens",
        "score_select",
        "select_beams",
        "token_logprob",
        "write_kv",
    }
