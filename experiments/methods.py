"""Methods by name: `erm`, any registered perturbation, and sums of them such as `lpa+lpl`.

A part may name its layer, `dropout@hidden2`, or several of which each step draws one,
`manifold_mixup@input|hidden1`; otherwise it stands at `--layer` (or the tuned one), and LPL always
at the logits. Options come from three places, later ones win: the method's own
defaults, the tuned hyperparameters, explicit flags.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lpa_jax
from lpa_jax import perturbations as perturbation_room
from lpa_jax.injection import LOGITS, check_layer
from lpa_jax.perturbations import Perturbation

ERM = "erm"
ASSIGNMENTS = ("frequency", "confidence", "all_positive", "all_negative")
RUN_OPTIONS = ("learning_rate", "weight_decay")
_ASSIGNMENT_OPTIONS = ("assignment", "kappa", "split", "ema")


class Part(NamedTuple):
    """One perturbation of a method and the layer named for it, if any."""

    name: str
    layer: str | None


def parse(method: str) -> tuple[Part, ...]:
    """The parts of a method's name.

    Raises:
      ValueError: unknown perturbation.

    >>> parse("lpa@hidden1+lpl")
    (Part(name='lpa', layer='hidden1'), Part(name='lpl', layer=None))
    """
    if method == ERM:
        return ()
    parts = []
    for text in method.split("+"):
        name, _, layer = text.partition("@")
        if name not in perturbation_room.names():
            known = ", ".join((ERM, *perturbation_room.names()))
            raise ValueError(
                f"--methods: unknown method {name!r} in {method!r}; known: {known}, "
                "sums such as lpa+lpl, and name@layer"
            )
        parts.append(Part(name, layer or None))
    return tuple(parts)


def part_options(name: str) -> tuple[str, ...]:
    """Options that a part of this name takes, assignment and layer included."""
    own = perturbation_room.options(name)
    return (*own, *_ASSIGNMENT_OPTIONS, "layer") if "assignment" in own else (*own, "layer")


def options_for(
    method: str, tuned: Mapping[str, Any], explicit: Mapping[str, Any]
) -> dict[str, Any]:
    """Options of a method: `part.option` and the run's own `learning_rate` and `weight_decay`.

    Args:
      method: its name.
      tuned: hyperparameters found for this method, `{"lpa.radius": 0.1, ...}`, or empty.
      explicit: `option` (every part that has it) or `part.option` -> value, from flags.

    Raises:
      ValueError: a `part.option` that does not exist.
    """
    parts = parse(method)
    options = dict(tuned)
    for key, value in explicit.items():
        name, _, option = key.rpartition(".")
        if name and name not in perturbation_room.names():
            raise ValueError(f"--option: unknown perturbation {name!r} in {key!r}")
        if name and option not in part_options(name):
            raise ValueError(
                f"--option: {name} has no option {option!r}; it has: "
                f"{', '.join(part_options(name))}"
            )
        for part in parts:
            # LPL stands at the logits, whose scale has nothing to do with that of hidden layers.
            shared = not name and not (part.name == "lpl" and option in ("radius", "layer"))
            if part.name == name or (shared and option in part_options(part.name)):
                options[f"{part.name}.{option}"] = value
    return options


def build(
    method: str,
    options: Mapping[str, Any],
    *,
    layers: Sequence[str],
    layer: str | None,
    counts: Sequence[int],
) -> dict[str | tuple[str, ...], Perturbation]:
    """The perturbations of a method, by layer, or by the layers of which each step draws one.

    Args:
      method: its name.
      options: from `options_for`.
      layers: injection points of the model.
      layer: where parts without a layer of their own stand; the first hidden layer if None.
      counts: training examples of each class, for the frequency rule.

    Raises:
      ValueError: unknown layer or an option out of range.
    """
    chosen: dict[str | tuple[str, ...], list[Perturbation]] = {}
    for part in parse(method):
        own = {
            key.partition(".")[2]: value
            for key, value in options.items()
            if key.startswith(f"{part.name}.")
        }
        at = part.layer or own.pop("layer", None) or (LOGITS if part.name == "lpl" else layer)
        at = at or layers[1]
        own.pop("layer", None)
        several = tuple(at.split("|"))
        for name in several:
            check_layer(layers, name)
        at = several if len(several) > 1 else at
        if "assignment" in perturbation_room.options(part.name):
            rule = {key: own.pop(key) for key in _ASSIGNMENT_OPTIONS if key in own}
            own["assignment"] = assignment(counts=counts, **rule)
        chosen.setdefault(at, []).append(perturbation_room.create(part.name, **own))
    return {
        at: parts[0] if len(parts) == 1 else lpa_jax.chain(*parts) for at, parts in chosen.items()
    }


def assignment(
    *,
    counts: Sequence[int],
    assignment: str = "frequency",
    kappa: float = 0.0,
    split: float = 0.4,
    ema: float = 0.0,
) -> lpa_jax.Assignment:
    """An assignment rule by name.

    Raises:
      ValueError: unknown name or an option out of range.
    """
    rules = {
        "frequency": lambda: lpa_jax.by_frequency(counts, split=split, kappa=kappa),
        "confidence": lambda: lpa_jax.by_confidence(kappa=kappa, ema=ema),
        "all_positive": lpa_jax.all_positive,
        "all_negative": lpa_jax.all_negative,
    }
    if assignment not in rules:
        raise ValueError(
            f"--assignment must be one of {', '.join(ASSIGNMENTS)}, got {assignment!r}"
        )
    return rules[assignment]()


def load_tuned(path: str | pathlib.Path) -> dict[str, dict[str, Any]]:
    """Hyperparameters by method from a file that `experiments.tune` wrote.

    Raises:
      ValueError: the file is missing or is not such a file.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        tuned = {method: dict(entry["chosen"]) for method, entry in content["methods"].items()}
    except OSError as error:
        raise ValueError(f"--hparams: cannot read {str(path)!r} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"--hparams: {str(path)!r} is not a file written by experiments.tune"
        ) from None
    for method, entry in tuned.items():
        known = [f"{part.name}.{o}" for part in parse(method) for o in part_options(part.name)]
        for key in entry:
            if key not in (*known, *RUN_OPTIONS):
                raise ValueError(f"--hparams: {str(path)!r}: {method} has no option {key!r}")
    return tuned
