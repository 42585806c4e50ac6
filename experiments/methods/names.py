"""Methods by name: `erm`, a part such as `lpa` or `focal`, and sums such as `logit_adjusted+lpa`.

A part is a registered perturbation, a loss (at most one), a penalty, or one of four others: `mixup`
(Manifold Mixup at the input; in domain generalization of pairs of domains), `ldam_drw` (LDAM with
deferred re-weighting), `sam` (sharpness-aware minimisation), `posthoc_logit_adjustment` (of the
trained network's logits). A perturbation may name its layer, `dropout@hidden2`, or several of which
each step draws one, `manifold_mixup@input|hidden1`. Otherwise its layer is `--layer` or the tuned
one, for RSC the last hidden layer, for LPL always the logits. Options come from three sources, of
which later ones win: the method's defaults, tuned hyperparameters, explicit flags. `build` makes
the parts of a method from its name.
"""

import collections.abc
import functools
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.runtime import fields
from lpa_jax import checks, losses, penalties, perturbations

ERM = "erm"
MIXUP = "mixup"
SAM = "sam"
LDAM_DRW = "ldam_drw"
POSTHOC = "posthoc_logit_adjustment"
ASSIGNMENTS = ("frequency", "confidence", "all_positive", "all_negative")
RUN_OPTIONS = ("learning_rate", "weight_decay")
# In domain generalization a search may draw more, as DomainBed's does; these are compiled in.
COMPILED_RUN_OPTIONS = ("batch_size", "model_dropout")
DOMAIN_RUN_OPTIONS = (*RUN_OPTIONS, *COMPILED_RUN_OPTIONS)
ASSIGNMENT_OPTIONS = {"assignment": str, "kappa": float, "split": float, "ema": float}
# Options that a flag for all parts does not set: LPL is at the logits, whose scale is unrelated to
# that of hidden layers, and RSC is made for the last hidden layer.
_OF_ITS_OWN = {"lpl": ("radius", "layer"), "rsc": ("layer",)}
# Options that the task decides, not the user.
_GIVEN_BY_THE_TASK = ("num_domains", "total_steps")
# PGD steps are compiled one by one.
MOST_STEPS = 1000
# What error messages call the types of JSON values.
_KINDS = {
    float: "a number",
    int: "a number",
    bool: "true or false",
    str: "text",
    types.NoneType: "null",
}


class Part(NamedTuple):
    """One part of a method and the layer named for it, if any."""

    name: str
    layer: str | None


def loss_names() -> tuple[str, ...]:
    """Parts that replace `--loss`."""
    return (*(name for name in losses.names() if name != "cross_entropy"), LDAM_DRW)


def part_names() -> tuple[str, ...]:
    """All parts that a method may be a sum of."""
    return (*perturbations.names(), MIXUP, *loss_names(), *penalties.names(), SAM, POSTHOC)


def parse(method: str) -> tuple[Part, ...]:
    """The parts of a method's name.

    Raises:
      ValueError: an unknown part, a part named twice (perturbations: at the same layer), a layer
        for what takes none, or two losses.

    >>> parse("lpa@hidden1+lpl")
    (Part(name='lpa', layer='hidden1'), Part(name='lpl', layer=None))
    """
    if method == ERM:
        return ()
    parts = []
    for text in method.split("+"):
        name, _, layer = text.partition("@")
        if name == ERM:
            raise ValueError(
                f"--methods: {ERM} is no part of a sum and has no layer, got {method!r}"
            )
        if name not in part_names():
            known = ", ".join((ERM, *part_names()))
            raise ValueError(
                f"--methods: unknown method {name!r} in {method!r}"
                f"{checks.nearest(name, (ERM, *part_names()))}; known: {known}, "
                "sums such as lpa+lpl, and name@layer"
            )
        if layer and name not in perturbations.names() and name not in penalties.names():
            raise ValueError(f"--methods: {name} in {method!r} takes no layer")
        part = Part(name, layer or None)
        # A penalty may be named once, at whatever layer: of two only the last would count.
        if part in parts or (name in penalties.names() and name in {p.name for p in parts}):
            raise ValueError(f"--methods: {text} in {method!r} is named twice")
        parts.append(part)
    chosen = [part.name for part in parts if part.name in loss_names()]
    if len(chosen) > 1:
        raise ValueError(f"--methods: {method!r} names several losses, {' and '.join(chosen)}")
    return tuple(parts)


def check_different(names: Sequence[str]) -> None:
    """Refuses `--methods` that are empty or name a method twice.

    Raises:
      ValueError: naming the flag.
    """
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"--methods must name different methods, got {','.join(names)!r}")


def part_options(name: str) -> tuple[str, ...]:
    """Options that a part of this name takes, assignment and layer included."""
    return tuple(_option_types(name))


def _option_types(name: str) -> dict[str, Any]:
    if name in perturbations.names():
        own = perturbations.option_types(name)
        return own | (ASSIGNMENT_OPTIONS if "assignment" in own else {}) | {"layer": str}
    if name in penalties.names():
        own = penalties.option_types(name)
        return {option: own[option] for option in own if option not in _GIVEN_BY_THE_TASK}
    numbers = {
        MIXUP: ("alpha",),
        SAM: ("rho",),
        POSTHOC: ("tau",),
        LDAM_DRW: ("max_margin", "scale", "beta", "switch"),
    }
    if name in numbers:
        return dict.fromkeys(numbers[name], float)
    own = losses.option_types(name)
    # A function cannot be written on a command line.
    return {option: own[option] for option in own if not _is_function(own[option])}


def _is_function(annotation: Any) -> bool:
    return typing.get_origin(annotation) is collections.abc.Callable


def check_value(key: str, value: Any) -> None:
    """Refuses a value of a type that an option does not take; ranges are checked by the option.

    Args:
      key: an existing `part.option`, or an option of the run, which is a number.
      value: parsed from JSON.

    Raises:
      ValueError: naming the option.

    >>> check_value("lpa.radius", "big")
    Traceback (most recent call last):
    ValueError: lpa.radius must be a number, got 'big'
    """
    part, _, option = key.rpartition(".")
    annotation = _option_types(part)[option] if part else float
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    taken = typing.get_args(annotation) if union else (annotation,)
    # What a user registered may be annotated with anything, or with nothing.
    if not all(kind in _KINDS for kind in taken):
        return
    kinds = dict.fromkeys(_KINDS[kind] for kind in taken)
    if _KINDS.get(type(value)) not in kinds:
        raise ValueError(f"{key} must be {' or '.join(kinds)}, got {repr(value)[:80]}")
    if option == "steps" and value is not None:
        checks.integer(key, value, 0, MOST_STEPS)


def own_options(part: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of one part, without its name.

    >>> own_options("lpa", {"lpa.radius": 0.1, "lpl.radius": 1.0, "learning_rate": 0.1})
    {'radius': 0.1}
    """
    prefix = f"{part}."
    return {key.removeprefix(prefix): v for key, v in options.items() if key.startswith(prefix)}


def parsed_value(text: str) -> Any:
    """A number or a boolean where the text is one in JSON, the text itself otherwise.

    >>> parsed_value("0.1"), parsed_value("true"), parsed_value("free")
    (0.1, True, 'free')
    """
    try:
        return json.loads(text)
    except ValueError:
        return text


def options_for(
    method: str, tuned: Mapping[str, Any], explicit: Mapping[str, Any], loss: str | None = None
) -> dict[str, Any]:
    """Options of a method: `part.option`, and `learning_rate` and `weight_decay` of the run.

    Args:
      method: its name.
      tuned: hyperparameters found for this method, `{"lpa.radius": 0.1, ...}`, or empty.
      explicit: `option` (every part that has it) or `part.option` -> value, from flags.
      loss: `--loss`, the loss of methods without one of their own.

    Raises:
      ValueError: a `part.option` that does not exist, or a value that it does not take.
    """
    options = dict(tuned)
    for key, value in explicit.items():
        if "." in key:
            fields.named("option", functools.partial(check_option, key, value))
        options |= dict.fromkeys(reached(method, key, loss), value)
    return options


def reached(method: str, key: str, loss: str | None = None) -> list[str]:
    """The options of a method that an option from a flag sets.

    Args:
      method: its name.
      key: `option` (every part that has it) or `part.option`.
      loss: `--loss`, the loss of methods without one of their own.

    >>> reached("lpa+lpl", "steps"), reached("erm", "focal.gamma", "focal"), reached("erm", "norm")
    (['lpa.steps', 'lpl.steps'], ['focal.gamma'], [])
    """
    name, _, option = key.rpartition(".")
    parts = [part.name for part in parse(method)]
    if loss is not None and not {*parts} & {*loss_names()}:
        parts.append(loss)
    return [
        f"{part}.{option}"
        for part in dict.fromkeys(parts)
        if part == name
        or (not name and option in part_options(part) and option not in _OF_ITS_OWN.get(part, ()))
    ]


def check_option(key: str, value: Any) -> None:
    """Refuses a `part.option` that does not exist, or a value of a type that it does not take.

    Raises:
      ValueError: naming the nearest spelling.
    """
    name, _, option = key.rpartition(".")
    if not name:
        checks.choice("the option", key, DOMAIN_RUN_OPTIONS)
        check_value(key, value)
        return
    checks.choice(f"the part of {key!r}", name, part_names())
    checks.choice(f"the option of {name} in {key!r}", option, part_options(name))
    check_value(key, value)
