"""Demo: bundled models, and what they show.

Owns a small base and a smaller guide, how they were trained from nothing, the prompts and the gold
reward to try them with, and how a measurement and a search tree look in a terminal.
"""

from w2s_fast.demo.bundled import DemoModels, demo_model_paths
from w2s_fast.demo.gold import gold_reward
from w2s_fast.demo.measure import demo_methods, measure
from w2s_fast.demo.reviews import held_out_prompts
from w2s_fast.demo.show import answers_table, comparison, results_table, search_tree

__all__ = [
    "DemoModels",
    "answers_table",
    "comparison",
    "demo_methods",
    "demo_model_paths",
    "gold_reward",
    "held_out_prompts",
    "measure",
    "results_table",
    "search_tree",
]
