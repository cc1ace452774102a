"""lm-eval: a task of log-likelihoods and a task of generated texts, from files on this machine."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import openai
import pytest
from suite import MODEL, URL

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
DOCS = [
    {"question": "The sky is", "choices": [" blue", " green", " a long way off"], "answer": 0},
    {"question": "Two and two is", "choices": [" four", " five"], "answer": 0},
    {"question": "Rome lies in", "choices": [" Norway", " Italy"], "answer": 1},
]


def tasks(folder: Path) -> None:
    """Write the tasks and their documents to a folder."""
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
    }
    chosen = {"task": "chosen", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
    chosen |= {"doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}]}
    made = {"task": "made", "output_type": "generate_until", "doc_to_target": "{{choices[answer]}}"}
    made |= {"generation_kwargs": {"max_gen_toks": 8, "until": ["\n\n\n"]}, "metric_list": [{"metric": "exact_match"}]}
    for task in (chosen, made):
        (folder / f"{task['task']}.yaml").write_text(json.dumps({**shared, **task}))


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks(tmp_path)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(os.environ["WISP_CLIENTS_TOKENIZER"], tokenizer / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={"model": MODEL, "base_url": f"{URL}/completions", "tokenizer": str(tokenizer)},
        tasks=["chosen", "made"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found is not None
    return found


def check_log_likelihoods_and_texts(results: dict[str, Any]) -> None:
    client = openai.OpenAI(base_url=URL, api_key="none")
    best = 0
    for sample in results["samples"]["chosen"]:
        doc = sample["doc"]
        found = [float(answer[0][0]) for answer in sample["resps"]]
        expected = [likelihood(client, doc["question"], choice) for choice in doc["choices"]]
        assert found == pytest.approx(expected, abs=1e-4)
        best += max(range(len(found)), key=found.__getitem__) == doc["answer"]
    assert results["results"]["chosen"]["acc,none"] == pytest.approx(best / len(DOCS))
    for sample in results["samples"]["made"]:
        text = client.completions.create(model=MODEL, prompt=sample["doc"]["question"], max_tokens=8, temperature=0)
        assert sample["resps"][0][0] == text.choices[0].text


def likelihood(client: openai.OpenAI, question: str, choice: str) -> float:
    """Return the log-likelihood of a choice, by vLLM's `prompt_logprobs`."""
    body = {"prompt_logprobs": 0}
    whole = client.completions.create(model=MODEL, prompt=question + choice, max_tokens=1, extra_body=body)
    rows = whole.choices[0].prompt_logprobs
    prompt = (question + choice).encode()
    assert len(rows) == len(prompt), "a token of the tiny model is a byte"
    return sum(next(iter(row.values()))["logprob"] for row in rows[len(question.encode()) :])
