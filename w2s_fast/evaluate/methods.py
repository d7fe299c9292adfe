"""The methods that the paper compares, as settings of a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from w2s_fast.demo import Method
from w2s_fast.params import SearchParams

CANDIDATES = 16  # of best-of-N, and W * K of every search
WIDTHS = ((4, 4), (1, 16), (2, 8), (8, 2), (16, 1))  # the paper's first, then the others
CHUNK = 5  # L of every search

BASE, BEST_OF = "base", f"best-of-{CANDIDATES}"


def comparison_methods(
    common: SearchParams, betas: Sequence[float], ablation: bool = True, short: bool = False
) -> list[Method]:
    """The base alone first, then best-of-16, EFT, and the searches.

    Args:
        common: sampling settings, and the most tokens of an answer.
        betas: of EFT. ablation: beam width against successors, W * K = 16.
        short: the base, best-of-16, EFT with beta 1 and the paper's search, and nothing else.
    """

    def search(width: int, successors: int) -> SearchParams:
        return replace(
            common, method="cbs", beam_width=width, successors=successors, chunk_length=CHUNK
        )

    methods = [
        Method(BASE, replace(common, method="sample")),
        Method(BEST_OF, replace(common, method="bon", successors=CANDIDATES)),
    ]
    methods += [
        Method(f"EFT beta={beta:g}", replace(common, method="fusion", beta=beta))
        for beta in ([1.0] if short else betas)
    ]
    if not short:
        methods.append(Method("dynamic fusion", replace(common, method="dynamic_fusion")))
    for width, successors in WIDTHS if ablation and not short else WIDTHS[:1]:
        methods.append(Method(f"CBS W={width} K={successors}", search(width, successors)))
    if not short:
        width, successors = WIDTHS[0]
        params = replace(search(width, successors), proposal="fusion")
        methods.append(Method(f"CBS W={width} K={successors}, fused", params))
    return methods
