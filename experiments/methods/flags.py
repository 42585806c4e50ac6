"""Flags of methods: options of their perturbations, and what a random search draws."""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from absl import flags

from experiments.methods import names, search
from experiments.runtime import fields
from experiments.runtime.fields import setting
from lpa_jax import pgd
from lpa_jax.perturbations.lpa import MODES

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perturbing:
    """Options of perturbations that have flags; None leaves an option as tuned or default."""

    GROUP: ClassVar[str] = "LPA"

    layer: str | None = setting(
        None,
        "Layer of the perturbations that name none: input, a hidden layer or logits; unset: tuned, "
        "else the first hidden layer. LPL is always at the logits, and RSC at the last hidden "
        "layer unless it is written rsc@LAYER.",
    )
    radius: float | None = setting(
        None, "Radius of lpa and adversarial, relative to mean ||h||.", low=0
    )
    lpl_radius: float | None = setting(None, "Radius of lpl, in units of the logits.", low=0)
    steps: int | None = setting(None, "PGD steps.", low=0, high=names.MOST_STEPS)
    step_size: float | None = setting(
        None, "Path length of all PGD steps together, in radii.", above=0
    )
    geometry: str | None = setting(None, "Half-space of lpa and lpl.", allowed=pgd.GEOMETRIES)
    norm: str | None = setting(None, "Norm of the radius.", allowed=pgd.NORMS)
    shape: str | None = setting(
        None, "One value for each activation, or for each channel.", allowed=pgd.SHAPES
    )
    mode: str | None = setting(None, "How lpa reuses earlier gradients.", allowed=MODES)
    assignment: str | None = setting(
        None, "Rule that gives each class its sign.", allowed=names.ASSIGNMENTS
    )
    split: float | None = setting(
        None, "Head classes of the frequency rule, as a share or a number.", low=0
    )
    kappa: float | None = setting(
        None, "Strength of the assignment's factor on the radii of classes.", low=0
    )
    ema: float | None = setting(
        None, "Smoothing of the confidence rule over steps, in [0, 1).", low=0, below=1
    )
    negative_scale: float | None = setting(None, "Factor on the radius of negative classes.", low=0)
    option: tuple[str, ...] = setting(
        (),
        "Any other option, as PART.OPTION=VALUE, for example dropout.rate=0.3 or lpl.steps=10.",
        repeated=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Searching:
    """What a random search draws."""

    GROUP: ClassVar[str] = "search"

    search_layers: tuple[str, ...] = setting(
        (),
        "Layers from which a random search draws those of perturbations; unset: --layer, else all "
        "hidden layers.",
    )
    space: tuple[str, ...] = setting(
        (),
        "Range of an option that a random search draws, in place of the usual range or in "
        "addition: lpa.radius_target=0.03:2 (log-uniform) or lpa.steps=1|3|5.",
        repeated=True,
    )


def explicit_options() -> dict[str, Any]:
    """Options of perturbations that were given as flags.

    Raises:
      ValueError: a value out of bounds, or an `--option` that is not PART.OPTION=VALUE.
    """
    given = fields.read(Perturbing)
    fields.check(given)
    options = {name: value for name, value in vars(given).items() if value is not None}
    if "lpl_radius" in options:
        options["lpl.radius"] = options.pop("lpl_radius")
    for text in options.pop("option"):
        key, equals, value = text.partition("=")
        if not equals or "." not in key:
            raise ValueError(f"--option must be PART.OPTION=VALUE, got {text!r}")
        options[key] = names.parsed_value(value)
    return options


def options_for(method: str, found: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    """Options of a method: what was tuned or drawn, then flags.

    Args:
      method: its name.
      found: what was tuned or drawn.
      **others: options that come before those of the flags.

    Raises:
      ValueError: a flag's option that does not exist, or a value that it does not take.
    """
    given = explicit_options() | others
    return names.options_for(method, found, given, _loss()) | explicit_run_options()


def check_reach(methods: Sequence[str], own: Collection[str] = ()) -> None:
    """Refuses options and ranges from flags that no method takes.

    Args:
      methods: their names.
      own: flags that the experiment itself uses, too.

    Raises:
      ValueError: naming the flag; or an option that does not exist, or a value that it does not
        take.
    """
    for flag, is_missed in reach(methods):
        if is_missed and flag not in own:
            loss = f" --loss={_loss()}" if _loss() else ""
            raise ValueError(
                f"{flag} must be an option of a method in --methods={','.join(methods)}{loss}"
            )


def reach(methods: Sequence[str]) -> list[tuple[str, bool]]:
    """The options and ranges that were given, as flags, and whether no method takes them.

    Raises:
      ValueError: an option that does not exist, or a value that it does not take.
    """
    return [
        (flag, not any(names.reached(method, key, loss) for method in methods))
        for flag, key, loss in _given()
    ]


def forget_unreached(methods: Sequence[str]) -> None:
    """Takes back the flags that set no option of a method.

    A job of a sweep runs one of its methods, and the flags of the jobs are for all of them.
    """
    missed = [flag for flag, is_missed in reach(methods) if is_missed]
    FLAGS.option = [text for text in FLAGS.option if f"--option={text}" not in missed]
    for name in fields.flag_names(Perturbing):
        if f"--{name}" in missed:
            FLAGS[name].unparse()


def _given() -> list[tuple[str, str, str | None]]:
    """(flag as it was written, option, loss that it may be of) of all that was given."""
    explicit_options()  # raises for what is no option
    given = [
        (f"--{name}", "lpl.radius" if name == "lpl_radius" else name, _loss())
        for name in fields.flag_names(Perturbing)
        if name != "option" and FLAGS[name].present and FLAGS[name].value is not None
    ]
    for text in FLAGS.option:
        key, _, value = text.partition("=")
        value = names.parsed_value(value)
        fields.named("option", functools.partial(names.check_option, key, value))
        given.append((f"--option={text}", key, _loss()))
    for text in FLAGS.space if "space" in FLAGS else ():
        key, _ = search.parse_space(text)
        if "." in key:
            given.append((f"--space={text}", key, None))
    return given


def _loss() -> str | None:
    return FLAGS.loss if "loss" in FLAGS and FLAGS.loss != "cross_entropy" else None


def explicit_run_options() -> dict[str, float]:
    """Learning rate and weight decay, where they were given as flags."""
    given = {name: FLAGS[name].value for name in names.RUN_OPTIONS}
    return {name: value for name, value in given.items() if value is not None}


def searched_space() -> dict[str, search.Space]:
    """Ranges that replace those of the search, or add to them: those of `--head`, then `--space`.

    Raises:
      ValueError: no such option or no such range, or an option twice.
    """
    spaces = [search.parse_space(text) for text in FLAGS.space]
    options = [option for option, _ in spaces]
    if len(set(options)) < len(options):
        raise ValueError(f"--space must name different options, got {', '.join(options)}")
    return (search.COSINE_SCALE if FLAGS.head == "normalized" else {}) | dict(spaces)


def searched_layers(model: str) -> search.HiddenLayers:
    """Layers at which drawn perturbations may be placed.

    Raises:
      ValueError: a layer that the model does not have.
    """
    return search.hidden_layers(model, tuple([FLAGS.layer] if FLAGS.layer else FLAGS.search_layers))
