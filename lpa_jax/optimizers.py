"""Optimizers and learning-rate schedules, as optax chains in the order that PyTorch practice has.

The gradient is first clipped by its global norm, then decayed, then fed to the optimizer: in
PyTorch `clip_grad_norm_` sees the gradient of the loss alone, and the optimizer adds the decay in
its own step. So the bound holds for the gradient of the loss, not for the decay.

Nothing is clipped or decayed unless asked for. What is decayed goes by rank: parameters of rank 0
or 1 (biases, scales and offsets of normalisation) are left out unless `decay_biases_and_norms`.
Parameters of higher rank that are neither, such as the position embedding of a ViT, are decayed.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lpa_jax import checks
from lpa_jax.registry import Registry

LearningRate = float | optax.Schedule

SCHEDULES = ("constant", "cosine", "step")


def sgd(
    learning_rate: LearningRate,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    decay_biases_and_norms: bool = False,
) -> optax.GradientTransformation:
    """Stochastic gradient descent with momentum and coupled (L2) weight decay.

        g <- g min(1, clip_norm / ||g||) + weight_decay * w
        v <- momentum * v + g
        w <- w - learning_rate * (g + momentum * v  if nesterov else v)

    The decay enters before the momentum, as in PyTorch and the papers that we compare with.

    Args:
      learning_rate: Rate, or a function of the step such as `schedule` returns.
      momentum: In [0, 1).
      nesterov: Whether to look ahead; without effect at momentum 0.
      weight_decay: Coefficient of w, at least 0.
      clip_norm: Bound of the global norm of the gradient, positive; None does not clip.
      decay_biases_and_norms: Whether parameters of rank 0 and 1 are decayed as well.

    Returns:
      An optax transformation. Its update needs the parameters when weight_decay is not 0.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> optimizer = sgd(0.1, momentum=0.0, weight_decay=0.5)
      >>> params = {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}
      >>> gradient = jax.tree.map(jnp.zeros_like, params)
      >>> updates, _ = optimizer.update(gradient, optimizer.init(params), params)
      >>> round(float(updates["kernel"][0, 0]), 4), float(updates["bias"][0])
      (-0.05, -0.0)

    References:
      Sutskever et al. 2013, On the importance of initialization and momentum in deep learning.
    """
    _check_common(learning_rate, weight_decay, clip_norm)
    checks.number("momentum", momentum, high=1.0, open_high=True)
    transforms = _clipping(clip_norm)
    if not checks.vanishes(weight_decay):
        transforms.append(
            optax.add_decayed_weights(weight_decay, _decay_mask(decay_biases_and_norms))
        )
    transforms.append(optax.sgd(learning_rate, momentum or None, nesterov))
    return optax.chain(*transforms)


def adamw(
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    decay_biases_and_norms: bool = False,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay.

        g <- g min(1, clip_norm / ||g||)
        m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g^2
        w <- w - learning_rate * (mhat / (sqrt(vhat) + eps) + weight_decay * w)

    with mhat and vhat corrected for their start at 0. The decay is scaled by the learning rate, as
    in PyTorch, and never enters the moments.

    Args:
      learning_rate: Rate, or a function of the step such as `schedule` returns.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the denominator, positive.
      weight_decay: Coefficient of w, at least 0.
      clip_norm: Bound of the global norm of the gradient, positive; None does not clip.
      decay_biases_and_norms: Whether parameters of rank 0 and 1 are decayed as well.

    Returns:
      An optax transformation. Its update needs the parameters.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> optimizer = adamw(0.1)
      >>> params = jnp.zeros(2)
      >>> updates, _ = optimizer.update(jnp.array([3.0, -5.0]), optimizer.init(params), params)
      >>> [round(float(update), 4) for update in updates]  # the first step has the size of the rate
      [-0.1, 0.1]

    References:
      Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, arXiv 1711.05101.
    """
    _check_common(learning_rate, weight_decay, clip_norm)
    checks.number("b1", b1, high=1.0, open_high=True)
    checks.number("b2", b2, high=1.0, open_high=True)
    checks.number("eps", eps, open_low=True)
    adam = optax.adamw(
        learning_rate,
        b1,
        b2,
        eps,
        weight_decay=weight_decay,
        mask=_decay_mask(decay_biases_and_norms),
    )
    return optax.chain(*_clipping(clip_norm), adam)


def sam(
    optimizer: optax.GradientTransformation, rho: float = 0.05
) -> optax.GradientTransformationExtraArgs:
    """Sharpness-aware minimisation around an optimizer: its step is taken with another gradient.

        g' = grad L(w + rho grad L(w) / ||grad L(w)||_2)

    by `optax.contrib.sam`. `lpa_step` hands it the gradient function that it asks for: the same
    batch, random keys and perturbation rules at the displaced parameters, averaged over devices.

    Args:
      optimizer: What is given g' in place of g.
      rho: Distance to the displaced parameters, positive; published default 0.05.

    Returns:
      An optax transformation whose update needs the parameters and `grad_fn`.

    Raises:
      ValueError: If rho is not positive and finite.

    Example:
      >>> params, curve = jnp.array([2.0]), lambda w, _: w**3
      >>> optimizer = sam(optax.sgd(1.0), rho=0.5)
      >>> gradient, state = curve(params, 0), optimizer.init(params)
      >>> float(optimizer.update(gradient, state, params, grad_fn=curve)[0][0])  # -(2 + 0.5)^3
      -15.625

    References:
      Foret et al. 2021, Sharpness-Aware Minimization for Efficiently Improving Generalization,
      arXiv 2010.01412, equation 3.
    """
    check_transformation(optimizer)
    checks.number("rho", rho, open_low=True)
    ascend = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    return optax.contrib.sam(optimizer, ascend, sync_period=2, opaque_mode=True)


def schedule(
    name: str,
    base_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    milestones: Sequence[float] = (),
    factor: float = 0.2,
) -> optax.Schedule:
    """Learning rate as a function of the step, with linear warm-up.

        rate(t) = base_rate * min(1, (t + 1) / (W + 1)) * decay(t),    t = 0, 1, ..., T - 1

        constant: decay = 1
        cosine:   decay = (1 + cos(pi (t - W) / (T - W))) / 2 after the warm-up, 1 before it
        step:     decay = factor ^ #{m in milestones : t >= round(m T)}

    with W = warmup_steps and T = total_steps. The warm-up starts above 0, so that no step is
    wasted, and reaches base_rate at step W. Beyond T the rate stays what it is at T: 0 for cosine.

    Args:
      name: One of `SCHEDULES`.
      base_rate: Highest rate, at least 0.
      total_steps: T, at least 1.
      warmup_steps: W, at least 0 and below total_steps.
      milestones: For "step", one or more fractions of total_steps (warm-up included) in (0, 1),
        such as (0.3, 0.6, 0.8): fractions carry over to another number of epochs. The other
        schedules leave milestones and factor unused.
      factor: What each milestone multiplies the rate by, in (0, 1].

    Returns:
      A function of the step (Python int or traced integer) to a float32 rate.

    Raises:
      ValueError: If name is unknown or an argument is out of range.

    Example:
      >>> rate = schedule("step", 0.1, total_steps=200, milestones=(0.3, 0.6, 0.8))
      >>> [round(float(rate(step)), 5) for step in (59, 60, 120, 199)]
      [0.1, 0.02, 0.004, 0.0008]

    References:
      Loshchilov and Hutter 2017, SGDR, arXiv 1608.03983 (cosine); Goyal et al. 2017, arXiv
      1706.02677 (warm-up); Zagoruyko and Komodakis 2016, arXiv 1605.07146 (the example's steps).
    """
    checks.choice("name", name, SCHEDULES)
    checks.number("base_rate", base_rate)
    checks.integer("total_steps", total_steps, 1)
    checks.require(
        0 <= checks.real(warmup_steps) < total_steps,
        "warmup_steps",
        f">= 0 and below total_steps={total_steps}",
        warmup_steps,
    )
    boundaries = []
    if name == "step":
        checks.number("factor", factor, 0.0, 1.0, open_low=True)
        fractions = list(milestones) if isinstance(milestones, Iterable) else []
        checks.require(
            bool(fractions) and all(0.0 < checks.real(m) < 1.0 for m in fractions),
            "milestones",
            "one or more fractions of total_steps in (0, 1) for the schedule 'step'",
            milestones,
        )
        boundaries = [round(fraction * total_steps) for fraction in fractions]

    def decay(step):
        if name == "cosine":
            progress = (step - warmup_steps) / (total_steps - warmup_steps)
            return 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
        if name == "step":
            return factor ** sum((step >= boundary).astype(step.dtype) for boundary in boundaries)
        return jnp.ones_like(step)

    def rate(step):
        step = jnp.asarray(step, dtype=jnp.float32)
        warmup = jnp.minimum(1.0, (step + 1.0) / (warmup_steps + 1.0))
        return base_rate * warmup * decay(step)

    return rate


_REGISTRY: Registry[optax.GradientTransformation] = Registry(
    "optimizer", {"sgd": sgd, "adamw": adamw}
)
names = _REGISTRY.names


def create(name: str, learning_rate: LearningRate, **options: Any) -> optax.GradientTransformation:
    """The optimizer of that name.

    Args:
      name: One of `names`.
      learning_rate: Rate, or a function of the step such as `schedule` returns.
      **options: Keyword arguments of the factory, such as ``weight_decay``.

    Raises:
      ValueError: If name or an option is unknown, or the factory refuses an argument.

    Example:
      >>> optimizer = create("sgd", 0.1, weight_decay=5e-4, clip_norm=5.0)
      >>> create("lbfgs", 0.1)
      Traceback (most recent call last):
        ...
      ValueError: optimizer must be one of sgd, adamw, got 'lbfgs'
    """
    return _REGISTRY.create(name, learning_rate, **options)


def check_transformation(optimizer: Any) -> None:
    """Raises ValueError for an optimizer that is no optax transformation."""
    has_both = hasattr(optimizer, "init") and hasattr(optimizer, "update")
    fits = has_both and not isinstance(optimizer, type)
    checks.require_kind(fits, "optimizer", "an optax transformation", optimizer)


def _check_common(
    learning_rate: LearningRate, weight_decay: float, clip_norm: float | None
) -> None:
    if callable(learning_rate):
        checks.function("learning_rate", learning_rate, "step")
    else:
        checks.number("learning_rate", learning_rate)
    checks.number("weight_decay", weight_decay)
    if clip_norm is not None:
        checks.number("clip_norm", clip_norm, open_low=True)


def _clipping(clip_norm: float | None) -> list[optax.GradientTransformation]:
    return [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]


def _decay_mask(decay_biases_and_norms: bool) -> Callable[[Any], Any] | None:
    """None, which decays everything, or a function of the parameters that picks rank 2 and up."""
    if decay_biases_and_norms:
        return None
    return lambda params: jax.tree.map(lambda parameter: parameter.ndim > 1, params)
