"""The bundled demo: a small base, a smaller guide, and the prompts and the reward to try them."""

from dataclasses import dataclass
from pathlib import Path

from w2s_fast.demo.gold import gold_reward
from w2s_fast.demo.reviews import held_out_prompts

__all__ = ["DemoModels", "demo_model_paths", "gold_reward", "held_out_prompts"]


@dataclass(frozen=True)
class DemoModels:
    """Hugging Face folders of the bundled models; all hold the same tokenizer."""

    base: Path
    tuned: Path
    untuned: Path


def demo_model_paths() -> DemoModels:
    """Where the bundled models lie; `python -m w2s_fast.demo.train` has made them."""
    here = Path(__file__).parent
    return DemoModels(base=here / "base", tuned=here / "tuned", untuned=here / "untuned")
