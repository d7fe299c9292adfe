"""lm-evaluation-harness against a real server: its accuracy is the one computed directly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.support.servers import running
from w2s_fast import Engine
from w2s_fast.demo import demo_model_paths

LM_EVAL = Path(__file__).parents[2] / "build" / "lm-eval"
DOCS = [
    ("The film", [" was a delight.", " were a delights."]),
    ("The waiter", [" forgot us.", " forgot forgot."]),
    ("I have just", [" read Glass Harbor.", " the read of."]),
    ("This place", [" is a the.", " is worth a visit."]),
    ("My sister", [" liked it.", " it liked was."]),
    ("The plot", ["xyzzy", " dragged."]),
]
GOLD = [0, 0, 1, 1, 0, 0]  # not all as the model has it, so that the accuracy says something
TASK = """
task: made_here
dataset_path: json
dataset_kwargs:
  data_files:
    test: DOCS
test_split: test
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


def computed_directly(engine: Engine) -> tuple[float, list[list[float]]]:
    """The accuracy, and the log-prob of every choice, by transformers' own forward."""
    tokenizer, model = engine.tokenizer, engine.base.model
    assert tokenizer is not None
    values = []
    for query, choices in DOCS:
        own = []
        for choice in choices:
            before, both = tokenizer(query)["input_ids"], tokenizer(query + choice)["input_ids"]
            with torch.no_grad():
                logprobs = model(torch.tensor([both])).logits[0].log_softmax(-1)
            own.append(sum(float(logprobs[i - 1, both[i]]) for i in range(len(before), len(both))))
        values.append(own)
    right = [max(range(2), key=own.__getitem__) == gold for own, gold in zip(values, GOLD)]
    return sum(right) / len(right), values


@pytest.mark.long
def test_its_accuracy_is_the_one_computed_directly(tmp_path: Path) -> None:
    if not LM_EVAL.is_dir() and find_spec("lm_eval") is None:
        pytest.skip("lm-evaluation-harness is not here: make build/lm-eval/installed")
    rows = [
        {"query": query, "choices": choices, "gold": gold}
        for (query, choices), gold in zip(DOCS, GOLD)
    ]
    docs = tmp_path / "docs.jsonl"
    docs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "made_here.yaml").write_text(TASK.replace("DOCS", str(docs)))
    paths = demo_model_paths()
    engine = Engine(base=paths.base, device="cpu", kv_cache_tokens=8192)
    accuracy, expected = computed_directly(engine)
    assert 0 < accuracy < 1
    with running(engine, name="bundled") as server:
        arguments = {
            "base_url": f"{server.url}/v1/completions",
            "model": "bundled",
            "tokenizer_backend": "remote",  # by /tokenizer_info and /tokenize
            "num_concurrent": "3",
        }
        environment = {
            **os.environ,
            "PYTHONPATH": str(LM_EVAL),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "cache"),
        }
        ran = subprocess.run(
            [
                *(sys.executable, "-m", "lm_eval", "--model", "local-completions"),
                *("--model_args", ",".join(f"{k}={v}" for k, v in arguments.items())),
                *("--tasks", "made_here", "--include_path", str(tasks)),
                *("--output_path", str(tmp_path / "out"), "--log_samples"),
            ],
            env=environment,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
    assert ran.returncode == 0, ran.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["made_here"]
    assert found["acc,none"] == pytest.approx(accuracy)
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    told = [json.loads(line) for line in samples.read_text().splitlines()]
    for sample in told:
        values = [float(response[0][0]) for response in sample["resps"]]
        assert values == pytest.approx(expected[sample["doc_id"]], abs=1e-3)
