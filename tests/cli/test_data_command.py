"""`headrace data`, and training on what it built, as a shell would run them."""

import json
import random
from pathlib import Path

import pytest

from headrace.cli import main
from train.corpus_kit import some_text, write_jsonl

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "demo.toml"
SMALL = [
    "train.steps=2",
    "train.batch_size=2",
    "train.seq_length=32",
    "train.sample_every=0",
    "optimizer.warmup_steps=0",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_layers=1",
    "model.head_dim=8",
]


def run(capsys, *argv):
    """(exit code, standard output, standard error) of one command."""
    code: str | int | None
    try:
        code = main([str(a) for a in argv])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


@pytest.fixture
def texts(tmp_path):
    rng = random.Random(0)
    return write_jsonl(tmp_path / "texts.jsonl", [{"body": some_text(rng, 30)} for _ in range(30)])


def test_build_says_what_it_built_and_check_finds_damage(capsys, texts, tmp_path):
    out = tmp_path / "books"
    code, said, _ = run(
        capsys,
        "data",
        "build",
        texts,
        "--out",
        out,
        "--vocab-size",
        300,
        "--text-field",
        "body",
        "--validation",
        0.1,
        "--seed",
        3,
    )
    assert code == 0 and f"{out}: 30 documents (3 held out)" in said and "vocabulary 300, 1 shards" in said
    assert f"--set data.source={out} --set data.vocab_size=300" in said
    code, again, _ = run(capsys, "data", "check", out)
    assert code == 0 and again.strip() in said
    (out / "tokenizer.json").write_text((out / "tokenizer.json").read_text() + "\n")
    code, _, error = run(capsys, "data", "check", out)
    assert code == 2 and error.startswith(f"headrace: {out}/tokenizer.json is damaged")


def test_chats_say_what_counts_and_what_was_skipped(capsys, tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    file = write_jsonl(tmp_path / "c.jsonl", [{"talk": turns}] * 3 + [{"talk": turns[:1]}])
    out = tmp_path / "chats"
    code, said, _ = run(
        capsys, "data", "build", file, "--out", out, "--vocab-size", 270, "--chat", "--messages-field", "talk"
    )
    assert code == 0 and "skipped 1 without a turn of the assistant" in said and "of which count" in said
    code, said, _ = run(
        capsys, "data", "build", file, "--out", out, "--force", "--chat", "--messages-field", "talk", "--tokenizer", out
    )
    assert code == 0 and json.loads((out / "index.json").read_text())["masked"] is True


def test_end_tokens_inside_a_text_are_told(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    code, said, _ = run(
        capsys, "data", "build", tmp_path / "a.txt", "--out", tmp_path / "a", "--vocab-size", 270, "--split-on", ""
    )
    assert code == 0 and "1 documents have an end token before their end" in said and "--split-on" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab-size", 100], "--vocab-size=100 must be at least 260"),
        ([], "texts.jsonl:1: has no field 'text'"),
        (["--validation", 2], "--validation=2.0"),
        (["--tokenizer", "nowhere"], "--tokenizer=nowhere is not a folder"),
    ],
)
def test_bad_input_is_one_line(capsys, texts, tmp_path, flags, message):
    code, _, error = run(capsys, "data", "build", texts, "--out", tmp_path / "x", *flags)
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_a_built_folder_trains_and_generates(capsys, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        run(capsys, "data", "build", texts.name, "--out", "data/books", "--vocab-size", 300, "--text-field", "body")[0]
        == 0
    )
    sets = [f"--set={one}" for one in ("data.source=data/books", "data.vocab_size=0", "data.shuffle=pieces", *SMALL)]
    code, said, error = run(capsys, "train", RECIPE, "--out", "run", *sets)
    assert code == 0, error
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 2
    assert (tmp_path / "run/hf/tokenizer.json").read_bytes() == (tmp_path / "data/books/tokenizer.json").read_bytes()
    code, said, _ = run(capsys, "generate", "run/hf", "--prompt", "the river", "--max-tokens", 3)
    assert code == 0 and said.startswith("the river")


def test_a_source_that_is_not_there_is_named(capsys, tmp_path):
    code, _, error = run(capsys, "train", RECIPE, "--out", tmp_path / "run", "--set", "data.source=nowhere")
    assert code == 2 and "data.source='nowhere' is neither tinyworld nor a folder" in error
