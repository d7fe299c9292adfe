"""Prompts that come and go in a page manager with a prefix cache."""

import numpy as np

from tests.csrc.managers import PAGE_SIZE, i32
from w2s_fast._pages import PageManager

FIRST, SECOND, THIRD = [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]  # a page of tokens each


def make(num_pages: int = 16, hash_bits: int = 64, prefix_cache: bool = True) -> PageManager:
    return PageManager(num_pages, PAGE_SIZE, 8, 4, prefix_cache, hash_bits)


def adopt(manager: PageManager, slot: int, tokens: list[int]) -> int:
    return manager.adopt(i32(slot), i32(*tokens), i32(len(tokens))).item()


def match(manager: PageManager, tokens: list[int]) -> int:
    return manager.match(i32(*tokens), i32(len(tokens))).item()


def remember(manager: PageManager, slot: int, tokens: list[int]) -> int:
    return manager.remember(i32(slot), i32(*tokens), i32(len(tokens)))


def grow(manager: PageManager, slot: int, tokens: int) -> np.ndarray:
    copies = manager.reserve(i32(slot), i32(tokens))
    manager.extend(i32(slot), i32(tokens))
    return copies


def begin(manager: PageManager, tokens: list[int]) -> int:
    """A request's beginning: adopt, compute the rest, remember."""
    slot = manager.allocate(1).item()
    grow(manager, slot, len(tokens) - adopt(manager, slot, tokens))
    remember(manager, slot, tokens)
    return slot


def run(manager: PageManager, *prompts: list[int]) -> None:
    """One request after the other, each from its beginning to its end."""
    for prompt in prompts:
        manager.release(i32(begin(manager, prompt)))
