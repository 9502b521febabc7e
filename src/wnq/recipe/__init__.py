"""A recipe: one TOML file that says model, data, quantization and training; and the folder that running it leaves.

``sections`` are the tables of the file, ``schema`` checks them, ``runs`` runs them, ``weights`` reads float checkpoints.
"""

from wnq.recipe.runs import build, load_run, resolve, run_recipe
from wnq.recipe.sections import (
    DataSection,
    ModelSection,
    ProcedureSection,
    QuantizeSection,
    Recipe,
    data_of,
    load_recipe,
    overrides_of,
    plan_of,
    procedure_of,
    recipe_from,
    stage_recipes,
)
from wnq.recipe.weights import load_weights_

__all__ = [
    "DataSection",
    "ModelSection",
    "ProcedureSection",
    "QuantizeSection",
    "Recipe",
    "build",
    "data_of",
    "load_recipe",
    "load_run",
    "load_weights_",
    "overrides_of",
    "plan_of",
    "procedure_of",
    "recipe_from",
    "resolve",
    "run_recipe",
    "stage_recipes",
]
