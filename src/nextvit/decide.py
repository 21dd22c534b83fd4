"""What a recipe leaves open, decided by the images and by what can be had: network, weights, epochs, rate."""

import math
from dataclasses import replace

from nextvit.create import model_of
from nextvit.data.split import Split
from nextvit.foreign import is_foreign
from nextvit.progress import say
from nextvit.recipe import Recipe
from nextvit.spec import VARIANTS
from nextvit.weights import PUBLISHED, TAGS, NotFetched, read_weights, resolve

SMALLEST = VARIANTS[0].name
IMAGES_TO_SEE, LEAST_EPOCHS, MOST_EPOCHS = 30_000, 10, 100
LAYER_DECAY = 0.8
RATE, RATE_BATCH = 1e-3, 16


def decided(recipe: Recipe, training: Split) -> Recipe:
    """With what the recipe leaves to the run: the network, the weights to start from, the epochs, the rate."""
    if recipe.model is None:
        recipe = _with_model(recipe)
    if recipe.weights is None:
        recipe = replace(recipe, weights="in1k" if recipe.model in PUBLISHED else "none")
    if recipe.schedule.epochs is None:
        epochs = min(MOST_EPOCHS, max(LEAST_EPOCHS, round(IMAGES_TO_SEE / len(training))))
        recipe = replace(recipe, schedule=replace(recipe.schedule, epochs=epochs))
    if recipe.optimizer.layer_decay is None:
        ours = recipe.weights != "none" and not is_foreign(recipe.variant)
        decay = LAYER_DECAY if ours else 1.0  # of random weights nothing is worth keeping
        recipe = replace(recipe, optimizer=replace(recipe.optimizer, layer_decay=decay))
    if recipe.optimizer.lr is None:
        # The square-root rule, for Adam. From weights it is the rate of the head: earlier layers have lower ones.
        rate = RATE * math.sqrt(min(recipe.batch_size, len(training)) / RATE_BATCH)
        recipe = replace(recipe, optimizer=replace(recipe.optimizer, lr=float(f"{rate:.2g}")))
    if recipe.task == "detect" and recipe.fixed_norms is None:  # those of random weights know nothing yet
        recipe = replace(recipe, fixed_norms=recipe.weights != "none")
    return recipe


def _with_model(recipe: Recipe) -> Recipe:
    """The network that the weights are of: those given, else the published ones of the smallest that has any.

    Where these cannot be had, the smallest network of all from random weights, with a warning.
    """
    if recipe.weights is None or recipe.weights in TAGS:
        try:
            resolve(PUBLISHED[0], recipe.weights or "in1k")
        except NotFetched as error:
            if recipe.weights is not None:
                raise NotFetched(f"{error} With --weights none it starts from random ones.") from None
            say(
                f"warning: {error} So {SMALLEST} starts from random weights here, which needs many more images to be "
                "as good."
            )
            return replace(recipe, model=SMALLEST, weights="none")
        return replace(recipe, model=PUBLISHED[0], weights=recipe.weights or "in1k")
    if recipe.weights == "none":
        return replace(recipe, model=SMALLEST)
    return replace(recipe, model=model_of(read_weights(resolve(SMALLEST, recipe.weights)[0])).metadata.variant)
