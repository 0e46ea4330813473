"""Published models in the layout of Hugging Face's transformers: config.json with a `model_type`, safetensors.

Loading is strict: every published tensor must be there with its shape, and no other. What a family's config.json and
tensors are here is in families/.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bestiary.data import tokenizer as tokens
from bestiary.errors import BestiaryError, UsageError
from bestiary.hub import families
from bestiary.hub.keys import Key
from bestiary.hub.shards import Shards
from bestiary.models import LanguageModel, packing


def load(folder: Path, fields: dict[str, Any], weights: str | None = None) -> tuple[LanguageModel, Any]:
    """Read (model, tokenizer) from a folder whose config.json holds `fields`; the tokenizer is None without one.

    The model has the narrowest floating-point type that holds all of its weights exactly, or packed `weights`.

    Raises:
        BestiaryError: the type is unknown, asks for what is not supported, or its files are damaged or do not fit.
    """
    try:
        recipe = families.recipe(fields)
        with torch.device("meta"):
            skeleton = LanguageModel(recipe.config)
    except (UsageError, RuntimeError, OverflowError) as error:
        raise BestiaryError(f"{folder / 'config.json'}: {error}") from error
    ours: dict[str, Tensor] = dict(skeleton.named_parameters())
    wanted = shapes(recipe, ours)
    shards = Shards(folder)
    extra = {name for name in shards.entries if name in recipe.tied or recipe.ignored.search(name)}
    shards.check(wanted, may_have=extra)
    for copy, original in recipe.tied.items():
        if copy in shards.entries and not torch.equal(shards.read(copy), shards.read(original)):
            raise BestiaryError(f"{shards.source}: {copy} should be {original} again, as config.json says, and is not")
    tokenizer = tokens.load(folder) if (folder / tokens.JSON_FILE).exists() else None
    if weights is not None:
        owner = {name: key for key in recipe.keys for name in key.ours}
        return packing.packed(skeleton, weights, lambda name: parameter(owner[name], shards, name)), tokenizer
    with torch.random.fork_rng(devices=[]):  # loading leaves the caller's random numbers alone
        model = LanguageModel(recipe.config).to(shards.dtype(wanted))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key in recipe.keys:
            for name, tensor in zip(key.ours, key.form.read([shards.read(name) for name in key.theirs])):
                parameters[name].copy_(tensor)
    return model, tokenizer


def parameter(key: Key, shards: Shards, name: str) -> Tensor:
    """One of our parameters by its key, read now."""
    return key.form.read([shards.read(theirs) for theirs in key.theirs])[key.ours.index(name)]


def shapes(recipe: families.Recipe, ours: dict[str, Tensor]) -> dict[str, torch.Size]:
    """The published tensors that a recipe reads, and their shapes, from those of our parameters."""
    named = [name for key in recipe.keys for name in key.ours]
    if sorted(named) != sorted(ours):
        wrong = sorted(set(named) ^ set(ours)) or sorted({name for name in named if named.count(name) > 1})
        raise AssertionError(f"the family's keys do not match the model's parameters: {wrong[:5]}")
    found: dict[str, torch.Size] = {}
    for key in recipe.keys:
        for name, tensor in zip(key.theirs, key.form.write([ours[name] for name in key.ours])):
            found[name] = tensor.shape
    return found
