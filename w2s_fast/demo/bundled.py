"""Where the bundled models lie; `python -m w2s_fast.demo.train` has made them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoModels:
    """Hugging Face folders of the bundled models; all hold the same tokenizer."""

    base: Path
    tuned: Path
    untuned: Path


def demo_model_paths() -> DemoModels:
    """The folders that come with the package."""
    here = Path(__file__).parent
    return DemoModels(base=here / "base", tuned=here / "tuned", untuned=here / "untuned")
