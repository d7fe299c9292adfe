"""What a device did while something ran, as torch.profiler saw it: kernels, copies, and gaps.

On a CPU the operators take the kernels' place: that serves dry runs, and says nothing of a device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Events of a device that are no work of it.
_WAITING = ("Context Sync", "Stream Sync", "Event Sync", "Stream Wait Event")
_SHOWN = 30
_NAME = 90  # characters of a kernel's name


class Interval(NamedTuple):
    """Of a device, or a call of the host's; microseconds."""

    name: str
    begin: float
    end: float


class Trace(NamedTuple):
    """By begin. ``device``: what it did; ``calls``: of CUDA, by the host."""

    device: list[Interval]
    calls: list[Interval]

    @property
    def busy(self) -> float:
        """Microseconds in which the device did anything at all."""
        return self.span - sum(gap for gap, *_ in self.gaps())

    @property
    def span(self) -> float:
        """Microseconds from the first to the last."""
        if not self.device:
            return 0.0
        return max(one.end for one in self.device) - self.device[0].begin

    def gaps(self) -> list[tuple[float, str, str]]:
        """Microseconds in which the device did nothing, and what came before and after."""
        found = []
        last = None
        for one in self.device:
            if last is not None and one.begin > last.end:
                found.append((one.begin - last.end, last.name, one.name))
            if last is None or one.end > last.end:
                last = one
        return found


def trace(run: Callable[[], object], device: torch.device) -> Trace:
    """What ``run`` had the device do. Slower than without: only the device's times mean anything.

    Other threads' work counts as well.
    """
    cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize(device)
    on_device: list[Interval] = []
    calls: list[Interval] = []
    for event in profiler.events():
        interval = Interval(event.name, event.time_range.start, event.time_range.end)
        if event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU):
            if not (getattr(event, "is_user_annotation", False) or event.name in _WAITING):
                on_device.append(interval)
        elif event.name.startswith("cu"):
            calls.append(interval)
    return Trace(*(sorted(found, key=lambda one: one.begin) for found in (on_device, calls)))


def table(found: Trace) -> str:
    """What took the device's time, the most first, and where it had nothing to do."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for one in found.device:
        by_name[one.name].append(one.end - one.begin)
    whole = sum(sum(times) for times in by_name.values())
    lines = [
        f"{found.span / 1e3:.3f} ms, the device busy for {found.busy / 1e3:.3f} ms, "
        f"{len(found.device)} kernels and copies",
        f"{'count':>7} {'ms':>9} {'share':>6} {'us each':>8}  name",
    ]
    ordered = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    for name, times in ordered[:_SHOWN]:
        spent = sum(times)
        lines.append(
            f"{len(times):7d} {spent / 1e3:9.3f} {100 * spent / whole:5.1f}% "
            f"{spent / len(times):8.1f}  {name[:_NAME]}"
        )
    lines += _gap_lines(found.gaps())
    return "\n".join(lines) + "\n"


def _gap_lines(gaps: Sequence[tuple[float, str, str]]) -> list[str]:
    lines = ["gaps: how many, ms of all together"]
    for least, most in ((0.0, 2.0), (2.0, 10.0), (10.0, 100.0), (100.0, float("inf"))):
        own = [gap for gap, *_ in gaps if least <= gap < most]
        lines.append(f"{len(own):7d} {sum(own) / 1e3:9.3f}  of {least:g} to {most:g} us")
    for gap, before, after in sorted(gaps, reverse=True)[:5]:
        lines.append(f"{gap:9.1f} us  between {before[:40]} and {after[:40]}")
    return lines
