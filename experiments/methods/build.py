"""Builds a method from its name and options: perturbations, penalties, losses, optimizer."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

import lpa_jax
from experiments.methods.names import (
    ASSIGNMENT_OPTIONS,
    ASSIGNMENTS,
    LDAM_DRW,
    MIXUP,
    POSTHOC,
    RUN_OPTIONS,
    SAM,
    loss_names,
    own_options,
    parse,
    part_options,
)
from lpa_jax import losses, optimizers, penalties, perturbations
from lpa_jax.injection import INPUT, LOGITS, check_layer
from lpa_jax.perturbations import Perturbation

# LDAM's scale by the classifier in front of it: the published 30 is for cosines.
LDAM_SCALES = {"linear": 1.0, "normalized": 30.0}
# Share of the epochs after which LDAM-DRW re-weights: 160 of 200 in the paper.
DRW_SWITCH = 0.8
SAM_RHO = 0.05
# Of mixup at the input; Manifold Mixup has the default of its paper.
MIXUP_ALPHA = 1.0
# Options that decide no shape and no control flow: arguments of a compiled step.
_TRACEABLE = (
    "radius",
    "radius_target",
    "negative_scale",
    "rate",
    "sigma",
    "alpha",
    "probability",
    "smoothing",
    "tau",
    "gamma",
    "max_margin",
    "scale",
    "rho",
    "weight",
    "strength",
    "eta",
)


class Assembled(NamedTuple):
    """The parts that a method's name stands for.

    Attributes:
      perturbations: by layer, or by the layers of which each step draws one.
      penalties: by name.
      loss_stages: (first epoch, loss) pairs, or None where the method has no loss of its own.
      sam_rho: radius of sharpness-aware minimisation, or None.
      adjust_logits: applied to the logits in evaluation, or None.
    """

    perturbations: Mapping[str | tuple[str, ...], Perturbation]
    penalties: Mapping[str, penalties.Penalty]
    loss_stages: tuple[tuple[int, losses.Loss], ...] | None
    sam_rho: float | None
    adjust_logits: Callable[[jax.Array], jax.Array] | None


class Built(NamedTuple):
    """A method that is ready to train with.

    Attributes:
      parts: from `assemble`.
      optimizer: with SAM around it if the method says so.
      loss_stages: (first epoch, loss) pairs.
    """

    parts: Assembled
    optimizer: optax.GradientTransformation
    loss_stages: tuple[tuple[int, losses.Loss], ...]


def build(
    parts: Assembled,
    settings: Any,
    options: Mapping[str, Any],
    rate: optax.Schedule,
    loss_stages: tuple[tuple[int, losses.Loss], ...],
) -> Built:
    """Adds the optimizer and the losses to the parts of a method.

    Args:
      parts: from `assemble`.
      settings: of the run: `optimizer`, `weight_decay`, `clip_norm`, `decay_biases_and_norms`.
      options: of the method, whose own weight decay takes precedence.
      rate: learning rate as a function of the step.
      loss_stages: (first epoch, loss) pairs for methods without a loss of their own.
    """
    optimizer = optimizers.create(
        settings.optimizer,
        rate,
        weight_decay=options.get("weight_decay", settings.weight_decay),
        clip_norm=settings.clip_norm,
        decay_biases_and_norms=settings.decay_biases_and_norms,
    )
    if parts.sam_rho is not None:
        optimizer = optimizers.sam(optimizer, parts.sam_rho)
    return Built(parts, optimizer, parts.loss_stages or loss_stages)


def assemble(
    method: str,
    options: Mapping[str, Any],
    *,
    layers: Sequence[str],
    layer: str | None,
    counts: Sequence[int],
    epochs: int = 1,
    total_steps: int = 1,
    num_domains: int | None = None,
    head: str = "linear",
) -> Assembled:
    """Builds every part of a method.

    Args:
      method: its name.
      options: from `methods.options_for`.
      layers: injection points of the model.
      layer: of perturbations that name none; the first hidden layer if None. Penalties on
        features and RSC take the last hidden layer.
      counts: training examples of each class, for the frequency rule and long-tail losses.
      epochs: length of the run in epochs, of which LDAM-DRW re-weights the last part.
      total_steps: length of the run in steps, for penalties that grow during it.
      num_domains: training domains; None where the task has none.
      head: the model's classifier, which decides the default scale of LDAM.

    Raises:
      ValueError: unknown layer, an option out of range, or a head that a penalty cannot read.
    """
    perturbing: dict[str | tuple[str, ...], list[Perturbation]] = {}
    penalizing, stages, sam_rho, adjust = {}, None, None, None
    given = {"num_domains": num_domains or 1, "total_steps": total_steps}
    for part in parse(method):
        with option_named(part.name):
            own = own_options(part.name, options)
            if part.name == SAM:
                sam_rho = own.get("rho", SAM_RHO)
            elif part.name == MIXUP:
                perturbing.setdefault(INPUT, []).append(_mixup(own, num_domains))
            elif part.name == POSTHOC:
                adjust = _posthoc(counts, **own)
            elif part.name in loss_names():
                stages = _loss_stages(part.name, own, counts, epochs, head)
            elif part.name in penalties.names():
                if part.name == "isda" and head != "linear":
                    raise ValueError(
                        f"--head must be linear for isda, which reads it, got {head!r}"
                    )
                penalizing[part.name] = _penalty(part, own, given, layers)
            else:
                at, perturbation = _perturbation(part, own, layers, layer, counts)
                perturbing.setdefault(at, []).append(perturbation)
    chained = {at: p[0] if len(p) == 1 else lpa_jax.chain(*p) for at, p in perturbing.items()}
    return Assembled(chained, penalizing, stages, sam_rho, adjust)


@contextlib.contextmanager
def option_named(part: str) -> Iterator[None]:
    """Puts the part before the option that a ValueError of the block names."""
    try:
        yield
    except ValueError as error:
        if str(error).partition(" ")[0] in part_options(part):
            raise ValueError(f"{part}.{error}") from None
        raise


def traceable(method: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the options whose numbers may be traced instead of compiled in.

    A number that is 0 turns its part off, and `scale` may also be a name: these are compiled in.

    >>> traceable("lpa", {"lpa.radius": 0.1, "lpa.layer": "hidden1", "learning_rate": 0.0})
    ('lpa.radius',)
    """
    own = {f"{part.name}.{option}" for part in parse(method) for option in _TRACEABLE}
    own |= {*RUN_OPTIONS}
    return tuple(n for n in sorted(own) if isinstance(options.get(n), float) and options[n] != 0)


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


def _mixup(own, num_domains) -> Perturbation:
    if num_domains is None:
        return perturbations.create("manifold_mixup", **{"alpha": MIXUP_ALPHA} | own)
    return perturbations.domain_mixup(**own, num_domains=num_domains)


def _perturbation(part, own, layers, layer, counts) -> tuple[str | tuple[str, ...], Perturbation]:
    usual = {"lpl": LOGITS, "rsc": layers[-2]}.get(part.name, layer or layers[1])
    at = part.layer or own.get("layer") or usual
    own.pop("layer", None)
    several = tuple(at.split("|"))
    for name in several:
        check_layer(layers, name)
    if "assignment" in perturbations.options(part.name):
        rule = {key: own.pop(key) for key in ASSIGNMENT_OPTIONS if key in own}
        own["assignment"] = assignment(counts=counts, **rule)
    return several if len(several) > 1 else at, perturbations.create(part.name, **own)


def _penalty(part, own, given, layers) -> penalties.Penalty:
    takes = penalties.options(part.name)
    own |= {name: value for name, value in given.items() if name in takes}
    if "layer" in takes:
        own["layer"] = part.layer or own.get("layer") or layers[-2]
        check_layer(layers, own["layer"])
    return penalties.create(part.name, **own)


def _loss_stages(name, own, counts, epochs, head) -> tuple[tuple[int, losses.Loss], ...]:
    if name in ("ldam", LDAM_DRW):
        own = {"scale": LDAM_SCALES[head], **own}
    if name != LDAM_DRW:
        return ((0, losses.create(name, counts, **own)),)
    switch = own.pop("switch", DRW_SWITCH)
    if not 0 < switch < 1:
        raise ValueError(f"ldam_drw.switch must be in (0, 1), got {switch!r}")
    return losses.drw_stages(counts, max(1, round(switch * epochs)), **own)


def _posthoc(counts, tau: float = 1.0) -> Callable[[jax.Array], jax.Array]:
    return lambda logits: losses.adjust_logits(logits, counts, tau)
