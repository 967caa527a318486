"""`fp8_utils.get_fp8_recipe`: `--fp8-recipe dsv3` is a recipe of ours.

Megatron knows TE's recipes by name, and `custom`, which always becomes TE's `CustomRecipe`. There is no seam for a
subclass of `Float8BlockScaling`, which TE treats better (see `fp8.te_recipe`).
"""

import functools
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def get_fp8_recipe(config: Any) -> Any:
        from dsv3_megatron.fp8 import te_recipe
        from dsv3_megatron.fp8.precision import recipe_of

        recipe = recipe_of(config)
        return original(config) if recipe is None else te_recipe.recipe_named(recipe.name)

    return get_fp8_recipe


PATCH = Patch(
    name="get_fp8_recipe",
    target="megatron.core.fp8_utils:get_fp8_recipe",
    signature="(config)",
    why="--fp8-recipe dsv3 is a subclass of TE's Float8BlockScaling",
    install=_install,
)
