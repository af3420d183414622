"""A run leaves metrics, pictures, events, snapshots and a folder that others can read."""

import errno
import itertools
import math
import struct
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from headrace.attention.dense import DenseContext
from headrace.errors import ConfigError
from headrace.model.huggingface import load_model
from headrace.text.tokenizer import Tokenizer
from headrace.train import tinyworld
from headrace.train.config import load_recipe
from headrace.train.metrics import MetricsFile
from headrace.train.run import train
from train.run_kit import TIMES, lines_of


def test_a_run_leaves_metrics_and_a_folder(recipe_file, tmp_path, cpu_ops):
    recipe = load_recipe(recipe_file, ["train.sample_every=4", "train.validate_every=2"])
    seen: list[Mapping[str, Any]] = []
    sampled, ticks = [], itertools.count(0, 0.5)
    out = tmp_path / "run"
    result = train(
        recipe,
        out,
        seen.append,
        lambda trainer: sampled.append((trainer.steps, trainer.source.prompts(1))),
        ops=cpu_ops,
        clock=lambda: next(ticks),
    )
    lines = lines_of(out)
    assert lines == seen and [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    ordinary = {"step", "loss", "lr", "grad_norm", "tokens", *TIMES}
    assert [set(line) - ordinary for line in lines] == [set(), {"val_loss"}] * 3
    for line in lines:
        assert line["tokens_per_second"] == line["tokens"] / 0.5 and line["memory_bytes"] > 2**26
        assert 0 < line["mfu"] < 1
    assert (result.first_loss, result.final_loss) == (lines[0]["loss"], lines[-1]["loss"])
    assert result.validation_loss == lines[-1]["val_loss"] and math.isfinite(lines[-1]["val_loss"])
    assert result.tokens == sum(line["tokens"] for line in lines)
    assert sampled == [(4, tinyworld.prompts(1))]
    assert result.checkpoint == out / "hf" and {f.name for f in out.iterdir()} == {
        "hf",
        "loss.png",
        "metrics.jsonl",
        "run.json",
        "snapshots",
        "tensorboard",
    }


def test_the_same_recipe_leaves_the_same_metrics_but_for_times(recipe, tmp_path, cpu_ops):
    for name in ("a", "b"):
        train(recipe, tmp_path / name, ops=cpu_ops)
    assert lines_of(tmp_path / "a", timed=False) == lines_of(tmp_path / "b", timed=False)


def records_of(file):
    """The records of an event file: length, its checksum, bytes, theirs."""
    data, at = file.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield data[at + 12 : at + 12 + length]
        at += 16 + length


def test_tensorboard_has_the_metrics(recipe, tmp_path, cpu_ops):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    train(recipe, tmp_path / "run", ops=cpu_ops)
    [file] = (tmp_path / "run" / "tensorboard").iterdir()
    events = [Event.FromString(record) for record in records_of(file)]
    assert events[0].file_version == "brain.Event:2"
    assert (events[1].session_log.status, events[1].step) == (SessionLog.START, 1)
    for event, line in zip(events[2:], lines_of(tmp_path / "run"), strict=True):
        assert event.step == line.pop("step")
        assert {value.tag: value.simple_value for value in event.summary.value} == pytest.approx(line, rel=1e-6)


def test_a_folder_that_holds_a_run_is_left_alone(recipe, tmp_path, cpu_ops):
    train(recipe, tmp_path / "run", ops=cpu_ops)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    with pytest.raises(ConfigError, match="run holds a run: continue it with --resume, or give another --out"):
        train(recipe, tmp_path / "run", ops=cpu_ops)
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        train(recipe, tmp_path / "file", ops=cpu_ops)


def test_a_run_that_did_not_begin_may_be_begun_again(recipe_file, tmp_path, cpu_ops):
    wrong = load_recipe(recipe_file, ["parallel.tensor=2"])
    for _ in range(2):
        with pytest.raises(ConfigError, match="--processes 2"):
            train(wrong, tmp_path / "run", ops=cpu_ops)
    assert train(load_recipe(recipe_file), tmp_path / "run", ops=cpu_ops).checkpoint.is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.qk_norm=false"], r"model\.qk_norm=False cannot be written.* Qwen3ForCausalLM .* means True"),
        (["model.mlp_bias=true"], r"model\.mlp_bias=True"),
        (["model.qkv_bias=true"], r"model\.o_bias=False"),
        (["model.architecture=LlamaForCausalLM"], r"model\.qk_norm=True"),
        (["model.architecture=LlamaForCausalLM", "model.qk_norm=false", "model.sliding_window=9"], "sliding_window=9"),
        (
            [
                "model.architecture=MistralForCausalLM",
                "model.qk_norm=false",
                "model.sliding_window=9",
                "model.sliding_layers=[true,false]",
            ],
            r"model\.sliding_layers=\(True, False\)",
        ),
        (['model.rope_scaling={kind="linear",factor=2,beta_fast=3}'], r"model\.rope_scaling="),
    ],
)
def test_a_model_that_no_folder_can_hold_is_refused_at_the_start(recipe_file, tmp_path, cpu_ops, changes, message):
    recipe = load_recipe(recipe_file, changes)
    with pytest.raises(ConfigError, match=message):
        train(recipe, tmp_path / "run", ops=cpu_ops)
    assert not (tmp_path / "run").exists()


def test_a_reader_that_has_left_is_no_fault_of_the_disk(recipe, tmp_path, cpu_ops):
    def left(line):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        train(recipe, tmp_path / "run", left, ops=cpu_ops)


def test_divergence_names_the_last_good_snapshot(recipe_file, tmp_path, cpu_ops):
    wild = ["optimizer.learning_rate=1e30", "optimizer.warmup_steps=0", "optimizer.grad_clip=0"]
    with pytest.raises(ConfigError, match=r"at step \d.*there is no snapshot yet"):
        train(load_recipe(recipe_file, wild), tmp_path / "a", ops=cpu_ops)
    with pytest.raises(ConfigError, match=r"at step [23].*the last good snapshot is .*step-0000000[12]"):
        train(load_recipe(recipe_file, [*wild, "train.snapshot_every=1"]), tmp_path / "b", ops=cpu_ops)
    assert all(math.isfinite(line["loss"]) for line in lines_of(tmp_path / "b"))


def test_the_folder_loads_here_and_in_transformers(recipe, tmp_path, cpu_ops):
    transformers = pytest.importorskip("transformers")
    checkpoint = train(recipe, tmp_path / "run", ops=cpu_ops).checkpoint
    names = {file.name for file in checkpoint.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    }
    ours, theirs = Tokenizer.from_folder(checkpoint), transformers.AutoTokenizer.from_pretrained(checkpoint)
    chat = [{"role": "user", "content": "What is 3+4?"}]
    text = ours.apply_chat_template(chat)
    assert text == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for prompt in (text, "Once upon a time, Mia", "漢 😀 12"):
        assert ours.encode(prompt) == theirs(prompt)["input_ids"]
    assert (ours.eos_token_id, ours.bos_token_id) == (theirs.eos_token_id, theirs.bos_token_id)
    model = load_model(checkpoint, cpu_ops)
    peer = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.tensor(ours.encode(text))
    with torch.no_grad():
        logits = model(ids, torch.arange(len(ids), dtype=torch.int32), DenseContext(cpu_ops, model.config, [len(ids)]))
        expected = peer(ids[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert model.config.eos_token_ids == (0,)


def test_the_cli_may_stop_a_run_and_keep_what_was_measured(recipe, tmp_path, cpu_ops):
    def interrupt(line):
        if line["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", interrupt, ops=cpu_ops)
    assert len(lines_of(tmp_path / "run")) == 3


FULL = """
import resource, sys
from headrace.cli import main
from headrace.train.snapshots import writer

def full(*args, write=writer.write_file):
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    return write(*args)

writer.write_file = full
raise SystemExit(main(sys.argv[1:]))
"""


def test_a_disk_that_takes_no_more_is_a_clear_error_and_the_last_snapshot_stays(recipe_file, tmp_path, cpu_ops):
    """Files may not grow to a snapshot's size; then the disk is large again."""
    out, overrides = tmp_path / "run", ["train.snapshot_every=3"]
    train(load_recipe(recipe_file, [*overrides, "train.steps=3"]), out, ops=cpu_ops)
    [snapshot] = (out / "snapshots").iterdir()
    command = [
        sys.executable,
        "-c",
        FULL,
        "train",
        str(recipe_file),
        "--out",
        str(out),
        "--resume",
        "--set",
        overrides[0],
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "cannot be written: File too large" in ended.stderr and str(snapshot) in ended.stderr
    assert list((out / "snapshots").iterdir()) == [snapshot]
    train(load_recipe(recipe_file, overrides), out, ops=cpu_ops, resume=True, warn=lambda _: None)
    assert [line["step"] for line in lines_of(out)] == [1, 2, 3, 4, 5, 6]


def test_metrics_that_the_disk_does_not_take_are_a_clear_error(recipe, tmp_path, cpu_ops, monkeypatch):
    def full(self, line):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run" / "metrics.jsonl"))

    monkeypatch.setattr(MetricsFile, "write", full)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl cannot be written: No space left.*--resume"):
        train(recipe, tmp_path / "run", ops=cpu_ops)
