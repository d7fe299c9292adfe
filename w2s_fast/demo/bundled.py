"""Where the bundled models lie, which `python -m w2s_fast.demo.train` has made, and the adapter, by
`python -m w2s_fast.demo.tune`."""

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


def adapter_path() -> Path:
    """The folder of the bundled LoRA for SmolLM2-135M-Instruct, as PEFT saves one."""
    return Path(__file__).parent / "adapter"
