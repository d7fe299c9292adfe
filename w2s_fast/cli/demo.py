"""`w2s-fast demo`: the bundled models, steered, measured and shown."""

from __future__ import annotations

import platform
import time
from functools import partial
from typing import Annotated

import typer

from w2s_fast.cli.console import counting_bar, note, note_console, out_console
from w2s_fast.cli.models import decoder, load_engine, name_models


def demo(
    prompts: Annotated[int, typer.Option(help="How many held-out prompts to steer.", min=2)] = 100,
    seed: Annotated[int, typer.Option(help="Of the prompts and of the sampling.", min=0)] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="No colour, nothing that moves.")] = False,
) -> None:
    """Steer the bundled models over held-out prompts: a table, and one search tree."""
    console = out_console(plain)
    ascii_only = plain or console.options.ascii_only
    start = time.perf_counter()
    models = name_models()
    engine = load_engine(models, quiet=True)

    from w2s_fast.demo import (
        answers_table,
        comparison,
        demo_methods,
        held_out_prompts,
        measure,
        results_table,
        search_tree,
    )

    texts = held_out_prompts(prompts, seed)
    methods = demo_methods()
    with note_console().status("warming up"):  # first-time costs are no part of the measurement
        for method in methods:
            engine.generate(texts[:1], method.params)

    measurements = []
    with counting_bar(console, 16, hidden=plain or not console.is_terminal) as progress:
        for method in methods:
            task = progress.add_task(method.name, total=len(texts))
            step = partial(progress.advance, task)
            measurements.append(measure(engine, method, texts, seed, done=step))
            if plain or not console.is_terminal:
                note(f"{method.name}: {len(texts)} prompts in {measurements[-1].seconds:.1f} s")

    *_, best_of, search = measurements
    console.print(results_table(measurements, ascii_only))
    gap = comparison(search, best_of, ascii_only)
    console.print(f"Difference of gold rewards, prompt by prompt: {gap}")
    console.print()
    console.rule("[bold]one prompt, four answers[/bold]", characters="-" if ascii_only else "─")
    console.print(answers_table(texts[0], measurements))
    console.print()
    console.rule("[bold]how the search got there[/bold]", characters="-" if ascii_only else "─")
    console.print(search_tree(texts[0], search.results[0], decoder(engine), ascii_only))
    console.print()
    meaning = _meaning(prompts, seed, time.perf_counter() - start)
    console.print(meaning, style="dim", markup=False)


def _meaning(prompts: int, seed: int, seconds: float) -> str:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    threads = torch.get_num_threads()
    where = f"{device}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"
    return f"""\
Gold reward: VADER sentiment in [-1, 1], mean over the sentences of prompt and answer. It ranked the
tuned guide's training pairs; the search never sees it. Interval: Student's t over prompts.
Fluency: mean over prompts of the base's own log-prob per token of the answer, at temperature 1;
a change above 0 means that the base finds the answers likelier than its own.
EFT draws every token from the logits of all three models; the searches only ask the guides what
they think of text that the base wrote, a chunk at a time.
Answer tokens are those returned; sampled ones include discarded candidates. Both: over wall time.
Here: {where}; {seconds:.0f} s in all.
Reproduce: w2s-fast demo --prompts {prompts} --seed {seed}"""
