"""Attention: which keys each token of a pass may see, and what computes it over the pages.

``contract`` says what a backend is: it plans a pass of many rows, and the plan computes attention
for every layer. The room owns the backends, the tree of what rows share, and the attention function
that transformers calls. It knows rows and their new tokens, and no beams and no requests.
"""

from w2s_fast.attention.backends import BACKENDS, choose_backend, find_backend
from w2s_fast.attention.contract import Attends, AttentionPlan, Backend, LayerOptions
from w2s_fast.attention.dense import dense_attention
from w2s_fast.attention.flash import FlashAttention
from w2s_fast.attention.gathered import GatheredPlan
from w2s_fast.attention.interface import ATTENTION_NAME
from w2s_fast.attention.kernel import Bounds, KernelPlan, lay_out
from w2s_fast.attention.outbox import Outbox, Sheet
from w2s_fast.attention.row_tree import Level, RowTree
from w2s_fast.attention.staging import (
    Columns,
    Field,
    Fields,
    Reading,
    Room,
    brought,
    host_buffer,
    launch_copy,
    to_device,
)
from w2s_fast.attention.static_plan import SPLIT_RULE, Bucket, StaticPlan
from w2s_fast.kernels.paged_attention_triton import SPLIT_KEYS, SPLIT_QUERIES

__all__ = [
    "ATTENTION_NAME",
    "BACKENDS",
    "SPLIT_KEYS",
    "SPLIT_QUERIES",
    "SPLIT_RULE",
    "Attends",
    "AttentionPlan",
    "Backend",
    "Bounds",
    "Bucket",
    "Columns",
    "Field",
    "Fields",
    "FlashAttention",
    "GatheredPlan",
    "KernelPlan",
    "LayerOptions",
    "Level",
    "Outbox",
    "Reading",
    "Room",
    "RowTree",
    "Sheet",
    "StaticPlan",
    "brought",
    "choose_backend",
    "dense_attention",
    "find_backend",
    "host_buffer",
    "launch_copy",
    "lay_out",
    "to_device",
]
