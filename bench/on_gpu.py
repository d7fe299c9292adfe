"""How programs begin that look at a GPU, and are tried without one on the CPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench.reports import facts
from bench.rows import Rows, Seconds


class OnGpu(NamedTuple):
    """What was asked for.

    Attributes:
        dry: tiny shapes on the CPU, by one thread. out: the report's file.
        seconds: after which nothing is begun. only: names of parts, where not all were asked for.
    """

    dry: bool
    device: torch.device
    out: Path
    seconds: Seconds
    report: Rows
    only: tuple[str, ...] = ()


def begin(
    program: str,
    about: str,
    arguments: Sequence[str] | None,
    *,
    seconds: float,
    parts: Sequence[str] = (),
) -> OnGpu:
    """Read the command line; without a GPU the program ends here, unless the run is dry.

    Args:
        program: its module. about: its docstring.
        arguments: None: those of this process.
        seconds: unless the command says how many. parts: what ``--only`` may name.
    """
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="begin nothing after so long"
    )
    parser.set_defaults(only=())
    if parts:
        parser.add_argument("--only", nargs="+", choices=parts, metavar="PART", help="parts to run")
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    if not (torch.cuda.is_available() or args.dry_run):
        sys.exit(f"{program} looks at a GPU; without one: --dry-run")
    if args.dry_run:
        torch.set_num_threads(1)
    device = torch.device("cpu") if args.dry_run else torch.device("cuda", 0)
    report = Rows(args.out, facts(program, arguments))
    return OnGpu(args.dry_run, device, args.out, Seconds(args.seconds), report, tuple(args.only))
