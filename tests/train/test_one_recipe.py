"""Ranks that were started with different recipes: told by all of them, before anything is written."""

from headrace.errors import ConfigError
from headrace.kernels.load import load_ops
from headrace.train.config import load_recipe
from headrace.train.run import train
from parallel.rank_kit import run_mesh


def differ(mesh, recipe, out):
    try:
        train(
            load_recipe(recipe, [f"optimizer.learning_rate=1e-{3 + mesh.rank}"]),
            out,
            ops=load_ops("reference"),
            mesh=mesh,
        )
    except ConfigError as error:
        return str(error)
    return ""


def test_the_key_in_which_ranks_differ_is_named(recipe_file, tmp_path):
    answers = run_mesh("train.test_one_recipe:differ", 2, 1, str(recipe_file), str(tmp_path / "run"))
    assert (
        answers
        == [
            "rank 1 was started with optimizer.learning_rate=0.0001, rank 0 with 0.001: give all of them "
            "one recipe and the same --set"
        ]
        * 2
    )
    assert not (tmp_path / "run").exists()
