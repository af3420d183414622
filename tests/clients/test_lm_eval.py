"""lm-eval's numbers are the trainer's own, to the bit, and its generations are the engine's."""

import json

import pytest
import torch

from headrace import SamplingParams
from headrace.train.data import collate
from headrace.train.tinyworld import Document, exam

EXAM = exam(1, 8)
ENDED = "<|end|>"
STOP = "."
TOKENS = 16


def write_task(folder, name, rows, **fields):
    """A task of lm-eval's: a YAML file (JSON is YAML) and its rows beside it."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "target_delimiter": "",
        **fields,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def evaluate(clients, folder, model, url, tasks, *flags, **arguments):
    """(results, {task: its samples in order}) of a run of the command."""
    arguments = {"model": "tiny", "base_url": url, "max_retries": 1, **arguments}
    clients.run(
        "lm_eval",
        "--model",
        model,
        "--model_args",
        ",".join(f"{k}={v}" for k, v in arguments.items()),
        "--tasks",
        ",".join(tasks),
        "--include_path",
        folder,
        "--output_path",
        folder / "out",
        "--log_samples",
        *flags,
    )
    [results] = (folder / "out").rglob("results_*.json")
    samples = {}
    for task in tasks:
        [file] = (folder / "out").rglob(f"samples_{task}_*.jsonl")
        samples[task] = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return json.loads(results.read_text())["results"], samples


def choices(i):
    """The right answer to a question, and two that are wrong; a trained text ends with the end token."""
    return [EXAM[(i + k) % len(EXAM)][2] + ENDED for k in range(3)]


@pytest.fixture(scope="module")
def log_likelihoods(trainer):
    """By question and choice: the trainer's log-probabilities of the choice, of all texts in one batch."""
    texts = [
        Document(((prompt, choice.removesuffix(ENDED)),))
        for i, (_, prompt, _) in enumerate(EXAM)
        for choice in choices(i)
    ]
    batch = collate(texts, trainer.tokenizer, trainer.recipe.train.seq_length)
    with torch.no_grad():
        scores = trainer.log_probabilities(batch).tolist()
    told, start = [], 0
    for length in batch.lengths:
        mine = [score for score, row in zip(scores, batch.rows_R.tolist()) if start <= row < start + length]
        told.append(sum(mine))
        start += length
    return [told[i : i + 3] for i in range(0, len(told), 3)]


def generated(llm, prompts):
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, stop=(STOP,))
    return [llm.generate(prompt, params)[0].outputs[0].text for prompt in prompts]


def test_log_likelihoods_are_the_trainers(clients, server, checkpoint, trainer, llm, log_likelihoods, tmp_path):
    rows = [{"prompt": prompt, "choices": choices(i), "answer": 0} for i, (_, prompt, _) in enumerate(EXAM)]
    write_task(
        tmp_path,
        "replies",
        rows,
        output_type="multiple_choice",
        doc_to_text="{{prompt}}",
        doc_to_choice="choices",
        doc_to_target="answer",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    write_task(
        tmp_path,
        "tales",
        rows[:3],
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{choices[0]}}",
        generation_kwargs={"until": [STOP], "max_gen_toks": TOKENS},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    results, samples = evaluate(
        clients,
        tmp_path,
        "local-completions",
        f"{server.url}/v1/completions",
        ["replies", "tales"],
        "--batch_size",
        "3",
        tokenizer=checkpoint,
        tokenizer_backend="huggingface",
        tokenized_requests=True,
        max_length=trainer.config.max_position_embeddings,
        num_concurrent=2,
    )
    told = [[float(score) for score, _ in sample["filtered_resps"]] for sample in samples["replies"]]
    assert told == log_likelihoods
    right = [scores.index(max(scores)) == 0 for scores in log_likelihoods]
    assert [sample["acc"] for sample in samples["replies"]] == right
    assert results["replies"]["acc,none"] == sum(right) / len(right)
    assert [sample["filtered_resps"][0] for sample in samples["tales"]] == generated(llm, [p for _, p, _ in EXAM[:3]])


def test_chats_are_the_engines(clients, server, llm, tmp_path):
    questions = ["Where does Mia live?", "What is 3+4?", "Do you know what Tom owns?"]
    write_task(
        tmp_path,
        "answers",
        [{"question": q} for q in questions],
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{question}}",
        generation_kwargs={"until": [STOP], "max_gen_toks": TOKENS},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    _, samples = evaluate(
        clients,
        tmp_path,
        "local-chat-completions",
        f"{server.url}/v1/chat/completions",
        ["answers"],
        "--apply_chat_template",
        num_concurrent=3,
    )
    expected = generated(llm, [llm.chat_prompt([{"role": "user", "content": q}]) for q in questions])
    assert [sample["filtered_resps"][0] for sample in samples["answers"]] == expected
    assert all(expected)
