"""Assignment rules: which classes are augmented positively, which negatively, and how far.

A rule maps what is known about the classes to a sign s_c in {-1, 0, +1} and a multiplier m_c of the
radius. The `confidence` and `frequency` rules, and both multipliers, are those published for LPL
(arXiv 2209.05668), the predecessor of LPA at the logits; LPA's abstract does not name its rule.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lpa_jax import checks
from lpa_jax.registry import described

Array = jax.Array
Rule = Callable[[Array, Array], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True, repr=False)
class Assignment:
    """A rule that gives every class a sign and a radius multiplier.

    Attributes:
      name: How the rule is called in logs and error messages.
      rule: (confidence [C], present [C] bool) -> (sign [C], multiplier [C]). Confidence is the mean
        probability of the true class, q_c; it is zero where nothing is known.
      uses_confidence: Whether `rule` reads the confidence (if not, none is computed).
      ema: Smoothing of the confidence over steps, in [0, 1): q <- ema * q + (1 - ema) * q_batch.
      num_classes: How many classes the rule is made for, or None for any number.
      description: What `print` shows, such as `by_confidence(kappa=0.0, ema=0.0)`.
    """

    name: str
    rule: Rule
    uses_confidence: bool = False
    ema: float = 0.0
    num_classes: int | None = None
    description: str = dataclasses.field(default="", compare=False)

    def __post_init__(self):
        """Refuses a rule that is no function, and an `ema` out of range."""
        checks.function("rule", self.rule, "confidence", "present")
        ema = checks.number("ema", self.ema, high=1.0, open_high=True)
        object.__setattr__(self, "ema", ema)

    def __repr__(self) -> str:
        """The factory's call, with all options."""
        return self.description or f"{self.name}(...)"

    def __call__(self, confidence: Array, present: Array) -> tuple[Array, Array]:
        """(sign, multiplier), both [C]; classes that are not present get sign 0."""
        result = self.rule(confidence, present)
        pair = isinstance(result, tuple) and len(result) == 2
        fits = pair and all(np.shape(values) in ((), present.shape) for values in result)
        got = [np.shape(values) for values in result] if pair else type(result).__name__
        allowed = f"one that returns (sign, multiplier), both of shape {present.shape}"
        checks.require(fits, f"rule of assignment {self.name!r}", allowed, got)
        sign, multiplier = map(jnp.asarray, result)
        return jnp.where(present, sign, 0.0), multiplier

    def check_num_classes(self, num_classes: int) -> None:
        """Raises ValueError where the rule was made for another number of classes."""
        if self.num_classes not in (None, num_classes):
            raise ValueError(
                f"assignment {self.name!r} is made for {self.num_classes} classes, "
                f"the network has {num_classes}"
            )


def by_confidence(kappa: float = 0.0, ema: float = 0.0) -> Assignment:
    r"""Positive augmentation for the classes that the network is least sure of.

        s_c = S(tau - q_c),   m_c = 1 + kappa |tau - q_c|,   tau = mean of q_c over present classes,

    where q_c is the mean probability of the true class over the class's members in the global
    batch. Absent classes are neither in tau nor given a sign.

    Args:
      kappa: How much further the classes far from tau are perturbed, >= 0.
      ema: Smoothing of q_c over steps in [0, 1), useful where a batch holds few of the classes.

    Raises:
      ValueError: `kappa` or `ema` out of range.

    Example:
      >>> sign, multiplier = by_confidence(kappa=2.0)(
      ...     jnp.array([0.9, 0.5, 0.0]), jnp.array([True, True, False]))
      >>> print(sign, np.asarray(multiplier[:2]).round(3))
      [-1.  1.  0.] [1.4 1.4]

    References:
      LPL's rule for balanced data (arXiv 2209.05668), except that LPL's released code counts
      absent classes with probability zero.
    """
    checks.number("kappa", kappa)

    def rule(confidence, present):
        present_mean = jnp.sum(jnp.where(present, confidence, 0.0)) / jnp.maximum(
            jnp.sum(present), 1
        )
        deviation = present_mean - confidence
        tied = jnp.abs(deviation) <= 1e-6  # rounding of the mean must not decide a sign
        return jnp.where(tied, 0.0, jnp.sign(deviation)), 1.0 + kappa * jnp.abs(deviation)

    text = described("by_confidence", {"kappa": kappa, "ema": ema})
    return Assignment("confidence", rule, uses_confidence=True, ema=ema, description=text)


def by_frequency(counts: ArrayLike, split: float | int = 0.4, kappa: float = 0.0) -> Assignment:
    r"""Negative augmentation for the head, positive for the tail of a long-tailed training set.

    Classes are ranked by training count N_c, the largest first, ties by index. With N_1 the largest
    and N_C the smallest count:

        head (rank <= split):  s_c = -1,   m_c = 1 + kappa N_c / N_1
        tail (the rest):       s_c = +1,   m_c = 1 + kappa N_C / N_c

    Args:
      counts: N_c, training examples of each class, [C], all > 0.
      split: How many classes are the head: a fraction of C if below 1 (rounded), else a number.
      kappa: Strength of the multiplier, >= 0.

    Raises:
      ValueError: `counts`, `split` or `kappa` out of range.

    Example:
      >>> sign, multiplier = by_frequency([100, 10, 1], split=1, kappa=1.0)(
      ...     jnp.zeros(3), jnp.ones(3, bool))
      >>> print(sign, np.asarray(multiplier).round(2))
      [-1.  1.  1.] [2.  1.1 2. ]

    References:
      LPL's long-tail rule (arXiv 2209.05668); its splits are 4 of 10 and 40 of 100 classes.
    """
    counts = checks.vector("counts", counts, open_low=True)
    checks.number("kappa", kappa)
    num_classes = counts.size
    head_size = checks.real(split)
    if 0 <= head_size < 1:
        head_size = round(head_size * num_classes)
    if not 0 <= head_size <= num_classes or head_size != int(head_size):
        raise ValueError(
            f"split must be a fraction below 1 or a whole number in 0..{num_classes}, got {split!r}"
        )
    head = np.zeros(num_classes, bool)
    head[np.argsort(-counts, kind="stable")[: int(head_size)]] = True
    sign = np.where(head, -1.0, 1.0)
    ratio = np.where(head, counts / counts.max(), counts.min() / counts)
    text = described("by_frequency", {"counts": counts, "split": split, "kappa": kappa})
    return _fixed("frequency", sign, 1.0 + kappa * ratio, text)


def all_positive() -> Assignment:
    """Every present class is augmented positively (s_c = +1, m_c = 1): an ablation.

    Example:
      >>> all_positive()(jnp.zeros(2), jnp.array([True, False]))[0].tolist()
      [1.0, 0.0]
    """
    return _constant("all_positive", 1.0)


def all_negative() -> Assignment:
    """Every present class is augmented negatively (s_c = -1, m_c = 1): an ablation.

    Example:
      >>> all_negative()(jnp.zeros(2), jnp.array([True, False]))[0].tolist()
      [-1.0, 0.0]
    """
    return _constant("all_negative", -1.0)


def custom(sign: ArrayLike, multiplier: ArrayLike | None = None) -> Assignment:
    """A fixed sign and multiplier for every class.

    Args:
      sign: s_c in {-1, 0, +1}, [C].
      multiplier: m_c >= 0, [C]; 1 for every class if None.

    Raises:
      ValueError: A sign outside {-1, 0, 1}, a negative multiplier or shapes that disagree.

    Example:
      >>> custom([1, 0, -1])(jnp.zeros(3), jnp.ones(3, bool))[0].tolist()
      [1.0, 0.0, -1.0]
    """
    sign = checks.vector("sign", sign, -math.inf)
    multiplier = checks.vector(
        "multiplier", np.ones_like(sign) if multiplier is None else multiplier
    )
    if not np.all(np.isin(sign, (-1.0, 0.0, 1.0))):
        raise ValueError(f"sign must be a list of -1, 0 and 1, got {sign.tolist()}")
    if multiplier.shape != sign.shape:
        raise ValueError(f"multiplier must be {sign.size} numbers, got {multiplier.tolist()}")
    text = described("custom", {"sign": sign, "multiplier": multiplier})
    return _fixed("custom", sign, multiplier, text)


def _fixed(name: str, sign: np.ndarray, multiplier: np.ndarray, text: str) -> Assignment:
    return Assignment(
        name,
        lambda confidence, present: (jnp.asarray(sign), jnp.asarray(multiplier)),
        num_classes=sign.size,
        description=text,
    )


def _constant(name: str, sign: float) -> Assignment:
    def rule(confidence, present):
        ones = jnp.ones(present.shape, jnp.float32)
        return sign * ones, ones

    return Assignment(name, rule, description=f"{name}()")
