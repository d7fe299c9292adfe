"""Beginnings of film reviews: some that the adapter is trained on, others held out."""

from __future__ import annotations

from pathlib import Path


def training_beginnings() -> list[str]:
    """80 of them; the adapter has seen no other."""
    return _lines("beginnings_train.txt")


def held_out_beginnings() -> list[str]:
    """120 of them, none of those that the adapter is trained on."""
    return _lines("beginnings_held_out.txt")


def _lines(name: str) -> list[str]:
    return (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines()
