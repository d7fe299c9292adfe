"""Demo: bundled models, and what they show.

Owns a small base and a smaller guide, how they were trained from nothing, an adapter for a real
model and how that was trained, the prompts and the gold reward to try them with, and how a
measurement and a search tree look in a terminal.
"""

from w2s_fast.demo.beginnings import held_out_beginnings
from w2s_fast.demo.bundled import DemoModels, adapter_path, demo_model_paths
from w2s_fast.demo.gold import gold_reward
from w2s_fast.demo.measure import Mean, Method, demo_methods, mean_with_interval, measure
from w2s_fast.demo.reviews import held_out_prompts
from w2s_fast.demo.show import answers_table, comparison, results_table, search_tree

__all__ = [
    "DemoModels",
    "Mean",
    "Method",
    "adapter_path",
    "answers_table",
    "comparison",
    "demo_methods",
    "demo_model_paths",
    "gold_reward",
    "held_out_beginnings",
    "held_out_prompts",
    "mean_with_interval",
    "measure",
    "results_table",
    "search_tree",
]
