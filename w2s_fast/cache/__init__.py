"""Cache: who holds which page of a model's KV cache, and what stands there; the face of csrc.

One :class:`PagePool` a model owns its pages, the slots that hold them, and the prefix cache of
prompts that were run before. The room knows sequences of tokens by their slots; what they are to a
search is the business of those above.
"""

from w2s_fast.cache.integers import NO_COPIES, Int32Array, Ints, as_int32
from w2s_fast.cache.pages import PagePool

__all__ = ["NO_COPIES", "Int32Array", "Ints", "PagePool", "as_int32"]
