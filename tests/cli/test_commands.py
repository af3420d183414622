"""The commands, run in this process as a shell would run them."""

import json
import math
import shutil

import pytest

from headrace.cli import demo, main
from headrace.errors import ConfigError


def run(capsys, *argv):
    """(exit code, standard output, standard error) of one command."""
    code: str | int | None
    try:
        code = main([str(a) for a in argv])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_generate_streams_one_prompt(capsys, tinyworld_checkpoint):
    code, out, _ = run(
        capsys, "generate", tinyworld_checkpoint, "--prompt", "One day", "--max-tokens", 5, "--temperature", 0
    )
    assert code == 0 and out.startswith("One day") and len(out) > len("One day\n")


def test_generate_many_as_json_and_with_every_option(capsys, tinyworld_checkpoint, tmp_path):
    file = tmp_path / "prompts"
    file.write_text("Once upon a time\n\nMia\n")
    code, out, _ = run(
        capsys,
        "generate",
        tinyworld_checkpoint,
        "--prompts",
        file,
        "--json",
        "--n",
        2,
        "--seed",
        4,
        "--max-tokens",
        6,
        "--ignore-eos",
        "--block-size",
        8,
        "--kv-cache-memory",
        "1MiB",
        "--kv-cache-dtype",
        "bf16",
        "--scheduling-policy",
        "lpm",
        "--batching",
        "orca",
        "--preemption",
        "swap",
        "--max-num-seqs",
        3,
        "--threads",
        1,
        "--queue-depth",
        2,
        "--no-prefix-caching",
        "--max-model-len",
        64,
    )
    outputs = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [o["prompt"] for o in outputs] == ["Once upon a time", "Mia"]
    assert all(len(choice["token_ids"]) == 6 for o in outputs for choice in o["outputs"])


def test_auto_budget_meets_a_loose_bound_and_refuses_an_impossible_one(capsys, tinyworld_checkpoint):
    prompt = [
        "generate",
        tinyworld_checkpoint,
        "--prompt",
        "One",
        "--max-tokens",
        2,
        "--max-num-batched-tokens",
        "auto",
    ]
    assert run(capsys, *prompt, "--slo-tbt", 60_000)[0] == 0
    code, _, err = run(capsys, *prompt, "--slo-tbt", 1e-6)
    assert code == 2 and "cannot be met" in err
    assert run(capsys, *prompt)[0] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scheduling-policy", "best"], "best"),
        (["--kv-cache-memory", "lots"], "not an amount of memory"),
        (["--kv-cache-memory", "100000GiB"], "free"),
        (["--kv-cache-memory", "100"], "block"),
        (["--num-kv-blocks", "1"], "block"),
        (["--block-size", "12"], "power of two"),
        (["--block-size", "many"], "--block-size"),
        (["--max-num-seqs", "0"], "max_num_seqs=0"),
        (["--max-num-batched-tokens", "-3"], "max_num_batched_tokens"),
        (["--max-num-batched-tokens", "some"], "max_num_batched_tokens"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--max-tokens", "99999"], "ask for at most"),
        (["--max-model-len", "99999"], "positions"),
        (["--threads", "9999"], "threads"),
        (["--device", "cuda", "--kernels", "cuda"], "GPU"),
        (["--n", "3", "--beam-width", "2"], "beam_width"),
        (["--slo-tbt", "5"], "slo_tbt"),
        (["--swap-memory", "1MiB"], "swap_memory"),
        (["--num-kv-blocks", "9", "--kv-cache-memory", "1MiB"], "not both"),
        (["--kernels", "cuda"], "device=cpu"),
        (["--queue-depth", "3"], "queue_depth"),
        (["--rank-timeout", "9"], "tensor_parallel_size"),
        (["--tensor-parallel-size", "2", "--rank-timeout", "0"], "rank_timeout=0"),
        (["--frobnicate"], "frobnicate"),
        (["--prompts", "/nowhere/at/all"], "no such file"),
    ],
)
def test_bad_flags_are_one_line_and_exit_2(capsys, tinyworld_checkpoint, flags, message):
    if "cuda" in flags:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    code, out, err = run(capsys, "generate", tinyworld_checkpoint, "--prompt", "One", *flags)
    assert code == 2 and out.strip() in ("", "One") and message in err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err


def test_bad_checkpoints_are_one_line_and_exit_2(capsys, tinyworld_checkpoint, tmp_path):
    assert run(capsys, "generate", tmp_path, "--prompt", "x")[0] == 2
    assert run(capsys, "generate", tmp_path / "nothing", "--prompt", "x")[0] == 2
    for file in tinyworld_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    code, _, err = run(capsys, "generate", tmp_path, "--prompt", "x")
    assert code == 2 and "100" in err and len(err.strip().splitlines()) == 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-50])
    code, _, err = run(capsys, "generate", tmp_path, "--prompt", "x")
    assert code == 2 and "model.safetensors" in err and len(err.strip().splitlines()) == 1


def test_chat_keeps_the_conversation(capsys, tinyworld_checkpoint, monkeypatch):
    lines = iter(["What is 3 plus 4?", "", "And then?", "/new", "Hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    code, out, _ = run(capsys, "chat", tinyworld_checkpoint, "--max-tokens", 5, "--temperature", 0)
    assert code == 0 and len(out.splitlines()) >= 3


def test_train_writes_metrics_and_a_checkpoint(capsys, tmp_path):
    sizes = [
        "train.steps=3",
        "optimizer.warmup_steps=1",
        "train.batch_size=1",
        "train.sample_every=2",
        "train.validate_every=2",
    ]
    command = ["train", "recipes/demo.toml", "--out", tmp_path / "run"]
    flags = [word for size in sizes for word in ("--set", size)]
    code, out, _ = run(capsys, *command, *flags)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (
        code == 0
        and [line["step"] for line in lines] == [1, 2, 3]
        and all(math.isfinite(line["loss"]) for line in lines)
    )
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file() and "step    2" in out
    assert f"held out {lines[1]['val_loss']:.3f}" in out
    for wrong, message in ((["--set", "train.stepz=3"], "did you mean train.steps?"), ([], "--resume")):
        code, _, err = run(capsys, *command, *wrong)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    code, out, _ = run(capsys, *command, *flags, "--set", "train.steps=4", "--resume")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert code == 0 and len(lines) == 4 and "warning: train.steps was 3 until step 3 and is 4 from here on" in out


@pytest.mark.filterwarnings("ignore")
def test_demo_once_leaves_a_summary_that_transformers_agrees_with(capsys, tmp_path, monkeypatch, request):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    sizes = [
        "train.steps=40",
        "train.batch_size=2",
        "optimizer.warmup_steps=5",
        "model.hidden_size=64",
        "model.head_dim=16",
        "model.num_layers=2",
    ]
    flags = [word for size in sizes for word in ("--set", size)]
    code, out, _ = run(capsys, "demo", "--once", *flags)
    assert code == 0 and "32/32 replies bit-identical to solo" in out and "cached " in out and "TTFT" in out
    assert "playground: http://127.0.0.1:" in out and '/v1/completions -d \'{"model": "demo"' in out
    summary = json.loads((tmp_path / "runs/demo/summary.json").read_text())
    assert set(summary) == {
        "train_seconds",
        "first_loss",
        "final_loss",
        "validation_loss",
        "accuracy",
        "ttft_ms",
        "tokens_per_second",
        "prompt",
        "reply",
        "checkpoint",
    }
    assert summary["final_loss"] < summary["first_loss"] and summary["reply"]
    tokenizer = AutoTokenizer.from_pretrained(summary["checkpoint"])
    model = AutoModelForCausalLM.from_pretrained(summary["checkpoint"], dtype=torch.float32)
    ids = tokenizer(summary["prompt"], return_tensors="pt").input_ids
    theirs = model.generate(
        ids, max_new_tokens=48, min_new_tokens=48, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    reply = tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True)
    assert summary["reply"][:20] == reply[:20]
    assert f"↳ {summary['reply'].strip()}" in out
    assert "With the tool find(who) at /v1/chat/completions, tool_choice auto:\n  Where can I find Finn? ↳ " in out
    (tmp_path / "runs/demo/summary.json").unlink()
    monkeypatch.setattr(demo, "serve_demo", lambda *_: None)
    code, out, _ = run(capsys, "demo")
    assert code == 0 and "--once trains again" in out and "Training" not in out


def files(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("error", "expected"), [(KeyboardInterrupt, 130), (ConfigError("diverged"), 2)])
def test_demo_keeps_the_old_model_until_a_new_one_is_there(
    capsys, tmp_path, monkeypatch, tinyworld_checkpoint, error, expected
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tinyworld_checkpoint, tmp_path / "runs/demo/hf")
    (tmp_path / "runs/demo/summary.json").write_text("{}")
    before = files(tmp_path)
    seen = []

    def stopped(self, record):
        seen.append(files(tmp_path / "runs/demo"))
        raise error

    monkeypatch.setattr("headrace.cli.demo.TrainingView.step", stopped)
    code, _, _ = run(capsys, "demo", "--once", "--set", "train.batch_size=1")
    assert code == expected and len(seen) == 1
    assert files(tmp_path) == before and seen[0] == files(tmp_path / "runs/demo")


def test_demo_swaps_whole_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "demo.new", "demo.old"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "whose").write_text(name)
    demo._swap()
    assert files(tmp_path / "runs") == {"demo/whose": b"demo.new"}


@pytest.mark.parametrize("summary", [b"{", b"\xff", b"[1]", b""])
def test_demo_goes_on_after_a_death_and_a_broken_summary(capsys, tmp_path, monkeypatch, tinyworld_checkpoint, summary):
    """Killed between the two halves of the swap: what there was is in runs/demo.old."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tinyworld_checkpoint, tmp_path / "runs/demo.old/hf")
    (tmp_path / "runs/demo.old/summary.json").write_bytes(summary)
    for part in ("_exam", "_same_bits", "_cache", "_reply"):
        monkeypatch.setattr(demo, part, lambda _, name=part: 1.0 if name == "_exam" else {name: 1})
    monkeypatch.setattr(demo, "serve_demo", lambda *_: None)
    code, out, _ = run(capsys, "demo")
    assert code == 0 and "using the model in runs/demo/hf" in out
    assert "runs/demo/summary.json cannot be read: the figures" in out
    written = json.loads((tmp_path / "runs/demo/summary.json").read_text())
    assert written["accuracy"] == 1.0 and not (tmp_path / "runs/demo.old").exists()


def test_ctrl_c_is_clean(capsys, monkeypatch, tinyworld_checkpoint):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("headrace.cli.generate.load", interrupted)
    code, _, err = run(capsys, "generate", tinyworld_checkpoint, "--prompt", "x")
    assert code == 130 and err.strip() == "headrace: interrupted"


def test_help_needs_no_torch():
    import subprocess
    import sys

    script = (
        "import sys; sys.argv=['headrace','--help']\nfrom headrace.cli import main\n"
        "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
