"""Evaluate: the paper's comparisons, on any models.

Owns which methods are compared, the prompts and rewards that they are compared by, what is measured
of their answers, and how tables, files and plots of it look. It runs nothing itself.
"""

from w2s_fast.evaluate.alpaca import Instruction, alpaca_method, alpaca_record, read_instructions
from w2s_fast.evaluate.measures import Answer, Row, measured
from w2s_fast.evaluate.methods import BASE, BEST_OF, comparison_methods
from w2s_fast.evaluate.plot import can_plot, write_plots
from w2s_fast.evaluate.prompts import read_posts, read_prompts
from w2s_fast.evaluate.report import evaluation_table, table_lines, write_csv, write_json
from w2s_fast.evaluate.rewards import ClassifierReward, Reward, vader_reward

__all__ = [
    "BASE",
    "BEST_OF",
    "Answer",
    "ClassifierReward",
    "Instruction",
    "Reward",
    "Row",
    "alpaca_method",
    "alpaca_record",
    "can_plot",
    "comparison_methods",
    "evaluation_table",
    "measured",
    "read_instructions",
    "read_posts",
    "read_prompts",
    "table_lines",
    "vader_reward",
    "write_csv",
    "write_json",
    "write_plots",
]
