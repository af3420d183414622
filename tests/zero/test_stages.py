"""ZeRO's four stages: one curve to the bit, the paper's memory inside a step, the paper's traffic between copies."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from headrace.parallel.group import DistributedGroup
from parallel.rank_kit import run_mesh
from parallel.test_trainer_bits import CURVE, RECIPE

STEPS = 6


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    file.write_text(RECIPE)
    return str(file)


def curve(recipe, size, tensor, *changes, steps=STEPS, sequence=False):
    answers = run_mesh(CURVE, size, tensor, recipe, [f"parallel.tensor={tensor}", *changes], steps, sequence=sequence)
    weights = {name: bits for answer in answers for name, bits in answer["weights"].items()}
    assert all(answer["curve"] == answers[0]["curve"] for answer in answers)
    return answers[0]["curve"], answers[0]["held out"], weights


VARIANTS = {
    "fp32": ["train.micro_batches=4", "optimizer.grad_clip=0.5", "parallel.bucket=2000"],
    "bf16": ["model.dtype=bfloat16", "train.recompute=full", "model.tie_word_embeddings=false", "parallel.bucket=9000"],
    "fp16": ["model.dtype=float16", "train.loss_scale=16777216", "train.micro_batches=4", "parallel.overlap=false"],
}


@pytest.mark.parametrize("variant, size", [("fp32", 2), ("fp32", 4), ("bf16", 4), ("fp16", 2)])
def test_every_stage_is_the_same_curve(recipe, variant, size):
    """And that is the curve of one process, where it computes as many parts."""
    changes = VARIANTS[variant]
    expected = curve(recipe, size, 1, *changes, "parallel.zero=0")
    for stage in (1, 2, 3):
        assert curve(recipe, size, 1, *changes, f"parallel.zero={stage}") == expected
    alone = [*changes, *([] if "train.micro_batches=4" in changes else [f"train.micro_batches={size}"])]
    assert curve(recipe, 1, 1, *alone) == expected


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
def test_stages_go_with_tensor_parallelism(recipe, stage, sequence):
    changes = ["train.micro_batches=4", "model.num_kv_heads=1", "parallel.bucket=3000"]
    expected = curve(recipe, 1, 1, *changes)
    assert curve(recipe, 4, 2, *changes, f"parallel.zero={stage}", sequence=sequence) == expected


@pytest.mark.parametrize(
    "size, tensor, changes",
    [
        (1, 1, ["parallel.offload_activations=true", "parallel.offload_optimizer=true", "model.dtype=bfloat16"]),
        (2, 2, ["parallel.partition_activations=true"]),
        (
            4,
            2,
            [
                "parallel.partition_activations=true",
                "parallel.offload_activations=true",
                "parallel.zero=3",
                "parallel.offload_optimizer=true",
            ],
        ),
    ],
    ids=["offloaded", "P_a", "P_a+cpu, stage 3"],
)
def test_what_is_kept_elsewhere_changes_no_bit(recipe, size, tensor, changes):
    narrow = [change for change in changes if "dtype" in change]
    expected = curve(recipe, 1, 1, "train.micro_batches=2", *narrow)
    assert curve(recipe, size, tensor, "train.recompute=full", "train.micro_batches=2", *changes) == expected


def _far_first(self):
    """A mutant: the far half of the ranks is added before the neighbours."""
    found, low, high, distance = [], 0, self.size, self.size // 2
    while distance:
        middle = (low + high) // 2
        found.append((distance, (low, middle, high)))
        low, high = (middle, high) if self.rank & distance else (low, middle)
        distance //= 2
    return found


def far_first(mesh, recipe, changes, steps):
    """The curve of the mutant, whose slots lie in the ranks' own order."""
    from parallel.trainer_jobs import curve as real

    with patch.multiple(DistributedGroup, _halves=_far_first, slot=property(lambda self: self.rank)):
        return real(mesh, recipe, changes, steps)


def test_a_tree_of_another_shape_is_seen(recipe):
    changes = ["train.micro_batches=4", "parallel.zero=2"]
    answer = run_mesh("zero.test_stages:far_first", 4, 1, recipe, changes, STEPS)[0]
    assert answer["curve"][0] == pytest.approx(curve(recipe, 4, 1, *changes)[0][0])
    assert answer["curve"] != curve(recipe, 4, 1, *changes)[0]


@pytest.mark.parametrize(
    "changes",
    [["parallel.reduce_every=step", "parallel.zero=1"], ["parallel.reduction=library", "parallel.zero=2"]],
    ids=["once", "library"],
)
def test_other_sums_are_nearly_the_same(recipe, changes):
    """What a flag gives up is the last bits, and nothing else."""
    expected, held_out, _ = curve(recipe, 2, 1, "train.micro_batches=4")
    got = run_mesh(CURVE, 2, 1, recipe, ["train.micro_batches=4", *changes], STEPS, library="library" in changes[0])[0]
    assert [step[0] for step in got["curve"]] == pytest.approx([step[0] for step in expected], rel=1e-4)
    assert got["held out"] == pytest.approx(held_out, rel=1e-4)
    # Only the first loss is that of the same weights.
    assert got["curve"][0][0] == expected[0][0]


# ---- memory and traffic

WIDE = (
    RECIPE.replace("hidden_size = 40", "hidden_size = 128")
    .replace("intermediate_size = 100", ("intermediate_size = 384"))
    .replace("head_dim = 12", "head_dim = 32")
    .replace("vocab_size = 320", ("vocab_size = 640"))
    .replace("num_layers = 2", "num_layers = 6")
    .replace("tie_word_embeddings = true", "tie_word_embeddings = false")
)
BUCKET = 100_000
STATES = ("weights", "gathered weights", "gradients", "fp32 masters", "optimizer moments")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    file = tmp_path_factory.mktemp("wide") / "recipe.toml"
    file.write_text(WIDE)
    return str(file)


def expected_bytes(stage, n, psi, block, width):
    """The paper's table for weights and gradients of `width` bytes; fp32 ones have no master."""
    optimizer = (12 if width == 2 else 8) * psi / (n if stage >= 1 else 1)
    gradients = width * psi / (n if stage >= 2 else 1)
    weights = width * psi / (n if stage >= 3 else 1)
    return optimizer + gradients + weights + (2 * width * block if stage == 3 else 0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("size, dtype", [(2, "bfloat16"), (2, "float32"), (4, "bfloat16")])
def test_states_take_the_paper_s_bytes_inside_a_step(wide, size, stage, dtype):
    """4Ψ + 12Ψ/N, 2Ψ + 14Ψ/N and 16Ψ/N + two blocks, of the tensors that are alive while blocks compute."""
    changes = [f"parallel.zero={stage}", f"model.dtype={dtype}", f"parallel.bucket={BUCKET}"]
    for told in run_mesh("zero.zero_jobs:sampled", size, 1, wide, changes):
        expected = expected_bytes(stage, size, told["matrices"], told["block"], told["width"])
        vectors = 16 * told["vectors"]
        # Cuts lie between chunks of 4096 elements. While the last block computes, the head is on its way beside the
        # two blocks' buffers.
        ends = {len(told["forward"]) - 1: told["table"] * told["width"] if stage == 3 else 0}
        for place, sample in (*enumerate(told["forward"]), *enumerate(told["backward"], 100)):
            states = sum(sample.get(name, 0) for name in STATES)
            assert 0.97 * expected <= states <= 1.03 * expected + vectors + ends.get(place, 0)
            # C_B: what is on its way is a handful of buckets, however large the model.
            assert sample.get("gradient buckets", 0) <= 6 * BUCKET * told["width"]
        assert {name: told["idle"].get(name, 0) for name in told["said"] if told["said"][name]} == {
            name: size for name, size in told["said"].items() if size
        }
        # Nothing else of that order stays from step to step.
        assert told["idle"].get("rest", 0) < 0.1 * told["matrices"] * told["width"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_moves_the_paper_s_volume(wide, stage):
    """2Ψ, and at stage 3 3Ψ: less, as neither the embedding nor the head needs its weights on the way back."""
    for told in run_mesh("zero.zero_jobs:volumes", 4, 1, wide, [f"parallel.zero={stage}"]):
        sizes = told["sizes"]
        psi, blocks = sum(sizes.values()), sum(size for name, size in sizes.items() if "layers" in name)
        assert told["gradients"] == (2 if stage == 0 else 1) * psi
        assert told["weights"] == {0: 0, 1: psi, 2: psi, 3: psi + blocks}[stage]
        assert told["gradients"] + told["weights"] <= (3 if stage == 3 else 2) * psi
        # Halving and doubling send 1 − 1/N of a message, once for each time that the volume counts it.
        assert told["bytes"] == pytest.approx(4 * 3 / 4 * (told["gradients"] + told["weights"]), rel=0.02)


def test_micro_steps_reduce_each_time_unless_told_otherwise(wide):
    def told(*changes):
        return run_mesh("zero.zero_jobs:volumes", 2, 1, wide, ["parallel.zero=1", "train.micro_batches=4", *changes])[0]

    each, once = told(), told("parallel.reduce_every=step")
    assert each["gradients"] == 2 * once["gradients"] == 2 * sum(each["sizes"].values())
    assert each["weights"] == once["weights"] == sum(each["sizes"].values())


def test_divided_activations_cost_less_than_a_tenth_more(wide):
    def told(*changes):
        full = ["parallel.tensor=2", "train.recompute=full", *changes]
        return run_mesh("zero.zero_jobs:volumes", 2, 2, wide, full)[0]

    plain, divided = told(), told("parallel.partition_activations=true")
    assert divided["checkpoints"] > 0
    assert divided["checkpoints"] < 0.1 * (divided["tensor"] - divided["checkpoints"])
    assert plain["checkpoints"] == 0


def test_keys_that_cannot_be_together_are_refused(recipe):
    from headrace.errors import ConfigError
    from headrace.train.config import load_recipe

    for changes, message in (
        (["parallel.zero=4"], "parallel.zero=4 must be an integer of at least 0 and at most 3"),
        (["parallel.zero=2", "parallel.reduce_every=step"], "use parallel.zero=1, or reduce every micro_step"),
        (["parallel.partition_activations=true"], "set parallel.tensor to 2 or more"),
        (["parallel.offload_activations=true"], "set train.recompute=full"),
        (["parallel.offload_folder=/nowhere"], "is not a folder"),
        (
            [
                "parallel.tensor=2",
                "parallel.sequence=true",
                "parallel.partition_activations=true",
                "train.recompute=full",
            ],
            "divide the same tensors",
        ),
        (["parallel.reduction=best"], "parallel.reduction"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_recipe(recipe, changes)
