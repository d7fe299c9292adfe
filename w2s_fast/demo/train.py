"""Makes the bundled demo models from nothing: `python -m w2s_fast.demo.train --out DIR`.

The base and the untuned guide are pre-trained on the same synthetic reviews; the tuned guide is
the untuned one after DPO on its own samples, ranked by the gold reward. No network is needed.
"""

import copy
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tokenizers
import torch
import typer
from rich.progress import Progress
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from w2s_fast.demo.card import recipe_and_numbers
from w2s_fast.demo.dpo import DPOSettings, preference_pairs, train_dpo
from w2s_fast.demo.pretrain import Advance, pretrain, token_loss
from w2s_fast.demo.reviews import reviews

EOS = "<|endoftext|>"
MAX_POSITIONS = 512


@dataclass(frozen=True)
class Dims:
    """Sizes of one Llama-type model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int


@dataclass(frozen=True)
class Pretraining:
    """How long and how fast one model is pre-trained."""

    dims: Dims
    steps: int
    lr: float  # its peak
    batch: int = 32  # reviews a step


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the models become."""

    seed: int = 0
    vocab_size: int = 1024
    tokenizer_reviews: int = 20_000
    base: Pretraining = Pretraining(Dims(256, 4, 4, 2, 640), steps=1200, lr=2e-3)
    guide: Pretraining = Pretraining(Dims(128, 2, 4, 2, 256), steps=350, lr=4e-3)
    eval_reviews: int = 512
    dpo: DPOSettings = field(default_factory=DPOSettings)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; one special token, used as BOS, EOS and padding, and never added by itself.

    The bytes make up 256 of the `vocab_size` entries, so any text can be encoded.
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=MAX_POSITIONS,
    )


def make_model(dims: Dims, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh model with tied embeddings, initialised from torch's global generator."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=dims.hidden,
        intermediate_size=dims.mlp,
        num_hidden_layers=dims.layers,
        num_attention_heads=dims.heads,
        num_key_value_heads=dims.kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=dims.hidden**-0.5 / 2,
    )
    # on a CPU and rows this short, eager attention's backward is faster than sdpa's
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def round_weights(model: LlamaForCausalLM) -> None:
    """Rounds to fp16, the stored precision, so that what follows sees the stored model."""
    for weight in model.parameters():
        weight.data = weight.data.half().float()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a Hugging Face folder in fp16, its tokenizer included."""
    stored = copy.deepcopy(model)
    stored.half()  # type: ignore[no-untyped-call]
    stored.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Workshop:
    """The stages of a run; each starts from its own seed, so that none depends on another's length.

    `measured` collects what the stages measure, for CARD.md.
    """

    def __init__(self, recipe: Recipe, out: Path, progress: Progress):
        self.recipe = recipe
        self.out = out
        self.progress = progress
        self.measured: dict[str, float] = {}

    def seed(self, stage: int) -> int:
        """The seed of a stage's reviews; torch's generator starts from it too."""
        seed = self.recipe.seed * 1000 + stage
        torch.manual_seed(seed)
        return seed

    def bar(self, name: str, steps: int) -> Advance:
        """A new progress bar's callback."""
        bar = self.progress.add_task(name, total=steps)
        return lambda note: self.progress.update(bar, advance=1, description=f"{name}  {note}")

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.measured[f"minutes for {name} (wall clock)"] = (time.perf_counter() - begin) / 60

    def make_tokenizer(self) -> PreTrainedTokenizerFast:
        texts = (review.text for review in reviews(self.seed(0)))
        shown = itertools.islice(texts, self.recipe.tokenizer_reviews)
        return train_tokenizer(shown, self.recipe.vocab_size)

    def make_pretrained(
        self, name: str, part: Pretraining, tokenizer: PreTrainedTokenizerFast
    ) -> LlamaForCausalLM:
        """Both pre-trained models read the same reviews, as far as each goes."""
        seed = self.seed(1)
        model = make_model(part.dims, tokenizer)
        with self.timed(name):
            advance = self.bar(name, part.steps)
            pretrain(model, tokenizer, seed, part.steps, part.batch, part.lr, advance)
        round_weights(model)
        save(model, tokenizer, self.out / name)
        fresh = itertools.islice(reviews(self.seed(2), held_out=True), self.recipe.eval_reviews)
        loss = token_loss(model, tokenizer, list(fresh))
        self.measured[f"{name}, parameters"] = model.num_parameters()
        self.measured[f"{name}, loss after held-out prompts (nats a token)"] = loss
        return model

    def make_tuned(
        self, untuned: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
    ) -> LlamaForCausalLM:
        settings = self.recipe.dpo
        seed = self.seed(3)
        prompts = [review.prompt for review in itertools.islice(reviews(seed), settings.prompts)]
        with self.timed("pairs and tuned"):
            advance = self.bar("pairs", settings.batches)
            pairs = preference_pairs(untuned, tokenizer, prompts, settings, advance)
            advance = self.bar("tuned", settings.steps(len(pairs)))
            tuned, measured = train_dpo(untuned, pairs, settings, seed, advance)
        save(tuned, tokenizer, self.out / "tuned")
        self.measured |= measured
        return tuned


def train(recipe: Recipe, out: Path, progress: Progress) -> dict[str, float]:
    """Makes all the models, writes them under `out`, and returns what was measured."""
    shop = Workshop(recipe, out, progress)
    tokenizer = shop.make_tokenizer()
    shop.make_pretrained("base", recipe.base, tokenizer)
    untuned = shop.make_pretrained("untuned", recipe.guide, tokenizer)
    shop.make_tuned(untuned, tokenizer)
    return shop.measured


def write_card(recipe: Recipe, measured: dict[str, float], out: Path) -> None:
    """CARD.md: how the models were made, and the numbers measured while making them."""
    settings = {key: value for key, value in asdict(recipe).items() if key != "dpo"}
    settings |= {f"DPO {key}": value for key, value in asdict(recipe.dpo).items()}
    lines = [
        "# The demo models",
        "",
        "Made and written down by `python -m w2s_fast.demo.train`.",
        "",
        "- **Data.** Synthetic film, book and restaurant reviews (`reviews.py`), each sentence",
        "  positive, negative or neutral by chance. Titles of the held-out prompts are not in it.",
        "- **base**, **untuned**. Llama-type models trained on next tokens of the same reviews.",
        "- **tuned**. `untuned` after DPO on pairs of its own samples, ranked by the gold reward",
        "  (`gold.py`: VADER's compound score, averaged over sentences).",
        "- **Storage.** fp16 safetensors; one byte-level BPE tokenizer, in every folder.",
        "- **Prompts.** Plain text such as `Last night we saw Silver Bridge`: no template, no",
        "  space at the end. Reviews of this one style are all that these models know: they are",
        "  for trying the engine, and for nothing else.",
        "",
        *recipe_and_numbers(settings, measured, ("transformers",)),
    ]
    (out / "CARD.md").write_text("\n".join(lines))


def main(
    out: Annotated[Path, typer.Option(help="folder that the models are written to")],
    seed: Annotated[int, typer.Option(help="decides data, initial weights and samples")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Train the demo's tokenizer, base, untuned and tuned models."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(seed=seed)
    with Progress() as progress:
        measured = train(recipe, out, progress)
    write_card(recipe, measured, out)
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
