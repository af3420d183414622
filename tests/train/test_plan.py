"""A plan against what real trainers hold, on one rank and on several."""

from pathlib import Path

import pytest

from headrace.errors import ConfigError
from headrace.train.config import load_recipe
from headrace.train.plan import MOMENTS, STATES, Planner
from parallel.rank_kit import run_mesh

ROOT = Path(__file__).resolve().parents[2]
CHANGES = [
    "model.intermediate_size=172",
    "model.num_layers=3",
    "train.batch_size=8",
    "train.seq_length=50",
    "model.max_position_embeddings=64",
]
LAYOUTS = {  # processes, tensor, changes
    "alone": (1, 1, []),
    "tied, biases": (1, 1, ["model.qkv_bias=true", "model.o_bias=true", "model.mlp_bias=true", "model.qk_norm=false"]),
    "micro-batches": (1, 1, ["train.micro_batches=4"]),
    "two ranks": (2, 2, ["model.tie_word_embeddings=false"]),
    "split stream": (2, 2, ["parallel.sequence=true"]),
    "shared kv heads": (4, 4, ["model.num_kv_heads=1"]),
    "dropout": (1, 1, ["model.dropout=0.1"]),
    "dropout, split stream": (2, 2, ["model.dropout=0.1", "parallel.sequence=true"]),
    "copies": (4, 2, ["train.micro_batches=4"]),
    "stage 2": (2, 1, ["parallel.zero=2"]),
    "stage 3": (2, 1, ["parallel.zero=3", "train.micro_batches=4"]),
}


BUFFERS = ("gathered weights", "gradient buckets")
"""Made in the first step, and there for good."""


def work_of(plan):
    """What a step needs beside that, at the moment when it is most."""
    return max(
        sum(n for kind, n in account.items() if kind not in (*STATES, *BUFFERS)) for account in plan.moments.values()
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("recompute", "dtype"), [("none", "float32"), ("selective", "bfloat16"), ("full", "bfloat16")])
def test_a_plan_is_what_the_trainer_holds(recipe_file, layout, recompute, dtype):
    """State and kept activations to the byte; the most at any moment is never more than planned, nor far below."""
    processes, tensor, changes = LAYOUTS[layout]
    changes = [*CHANGES, f"train.recompute={recompute}", f"model.dtype={dtype}", f"parallel.tensor={tensor}", *changes]
    recipe = load_recipe(recipe_file, changes)
    answers = run_mesh(
        "train.plan_jobs:measured", processes, tensor, str(recipe_file), changes, sequence=recipe.parallel.sequence
    )
    planner = Planner(recipe)
    plan = planner.plan(tensor, processes // tensor)
    for part, answer in zip(planner.ranks(tensor), answers):
        state = part.state(processes // tensor, recipe.parallel.zero)
        shared = {kind: answer[kind] for kind in STATES}
        # Cuts between copies lie between chunks of 4096 elements.
        assert state == (shared if not recipe.parallel.zero else pytest.approx(shared, rel=0.2))
        # The plan expects every token's row of the table to be this rank's.
        elsewhere = answer["elsewhere"] * (4 * recipe.model.hidden_size + 16)
        assert sum(part.kept(plan.rows, recompute).values()) == answer["kept"] + elsewhere
    assert max(answer[kind] for answer in answers for kind in BUFFERS) <= max(
        account[kind] for account in plan.moments.values() for kind in BUFFERS
    )
    peak = max(answer["peak"] for answer in answers)
    assert peak <= work_of(plan) <= 1.7 * peak


@pytest.mark.parametrize(
    "keys, tensor", [(["parallel.partition_activations=true"], 2), (["parallel.offload_activations=true"], 1)]
)
def test_a_plan_knows_what_is_kept_elsewhere(recipe_file, keys, tensor):
    changes = [*CHANGES, "train.recompute=full", f"parallel.tensor={tensor}", *keys]
    answers = run_mesh("train.plan_jobs:measured", tensor, tensor, str(recipe_file), changes)
    plan = Planner(load_recipe(recipe_file, changes)).plan(tensor)
    kept = 0 if tensor == 1 else max(answer["checkpoints"] for answer in answers)
    assert plan.kept["a block's input"] == kept and plan.kept["residual before a block"] == 0


def test_where_gradients_are_most_of_it_a_plan_is_close(recipe_file):
    changes = [*CHANGES, "train.seq_length=4", "train.micro_batches=4", "parallel.tensor=2"]
    answers = run_mesh("train.plan_jobs:measured", 4, 2, str(recipe_file), changes)
    plan = Planner(load_recipe(recipe_file, changes)).plan(2, 2)
    assert 1.0 <= work_of(plan) / max(answer["peak"] for answer in answers) <= 1.25


def test_the_recipe_of_7b():
    planner = Planner(load_recipe(ROOT / "recipes/7b.toml"))
    alone, eight = planner.plan(1), planner.plan(8)
    account = alone.moments["forward"]
    psi = account["weights"] / 2
    assert psi == pytest.approx(6.74e9, rel=0.01)
    assert account["fp32 masters"] + account["optimizer moments"] == pytest.approx(12 * psi, rel=1e-4)
    assert set(eight.moments) == set(MOMENTS) and eight.copies == 1
    assert eight.moments["forward"]["weights"] == pytest.approx(account["weights"] / 8, rel=2e-3)
    by = {what: plan.total for what, plan in planner.over(8, 16).items()}
    assert by["none"] > by["selective"] > by["full"]


@pytest.mark.parametrize(
    ("tensor", "devices", "message"),
    [
        (16, 16, "tensor parallelism of 16 does not divide the model's 8 virtual shards"),
        (8, 12, "12 devices are no multiple of 8"),
        (2, 12, "6 copies of the model are not a power of two"),
        (8, 4, "4 devices are fewer than 8"),
        (1, 32, "train.micro_batches=16 is no multiple of 32 copies|too few"),
        (8, 256, "train.batch_size=16 rows are too few for 32 copies"),
    ],
)
def test_layouts_that_cannot_be(tensor, devices, message):
    with pytest.raises(ConfigError, match=message):
        Planner(load_recipe(ROOT / "recipes/7b.toml")).over(tensor, devices)


def test_the_greatest_micro_batch():
    planner = Planner(load_recipe(ROOT / "recipes/7b.toml"))
    found = planner.greatest_micro_batch(8, 1, 40 * 2**30)
    assert found is not None and found.total <= 40 * 2**30
    assert all(planner.plan(8, 1, parts).total > 40 * 2**30 for parts in range(1, found.parts))
    assert planner.greatest_micro_batch(8, 1, 2**30) is None
