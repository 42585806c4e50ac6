"""Runs of the training step that its tests share: a model, its perturbations, the compiled step."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import lpa_jax
from lpa_jax.models import MLP
from lpa_jax.perturbations import identity, stateless
from tests.helpers import toy
from tests.helpers.toy import CLASSES, MULTIPLIER, SIGN, recording

LEARNING_RATE = 0.125
RADIUS = 0.3
OPTIMIZER = optax.sgd(LEARNING_RATE, momentum=0.9)
MODEL = MLP(CLASSES, hidden=(8, 6))
NORMALIZED = toy.NormalizedMLP(CLASSES, dropout=0.5)
FIXED = lpa_jax.custom(SIGN, MULTIPLIER)
NO_SIGNS = lpa_jax.custom([0, 0, 0, 0])
CONFIDENCE = lpa_jax.by_confidence(kappa=1.0)
MODES = ("cold", "carry", "free")


def fixed_lpa(mode, assignment=FIXED):
    return lpa_jax.lpa(RADIUS, mode=mode, assignment=assignment, scale="absolute")


def augment(rng, images, positions):
    offset = jax.random.uniform(rng) * positions
    return images + offset[:, None, None, None]


RUNS = {
    "erm": (MODEL, {}),
    "cold": (MODEL, {"hidden1": recording(fixed_lpa("cold"))}),
    "carry": (MODEL, {"hidden1": recording(fixed_lpa("carry"))}),
    "free": (MODEL, {"hidden1": recording(fixed_lpa("free"))}),
    "confidence": (
        MODEL,
        {
            "hidden1": recording(lpa_jax.lpa(RADIUS, assignment=CONFIDENCE)),
            "logits": recording(lpa_jax.lpl(RADIUS, assignment=CONFIDENCE)),
        },
    ),
    "normalized": (
        NORMALIZED,
        {
            # named from the top down: what counts is the order in the network
            "logits": recording(lpa_jax.lpl(RADIUS, steps=1)),
            "hidden1": recording(lpa_jax.lpa(RADIUS, steps=2, assignment=FIXED)),
        },
    ),
    "random": (
        MODEL,
        {
            "input": recording(identity()),
            "hidden1": lpa_jax.manifold_mixup(1.0),
            "hidden2": toy.site_key(),
            "logits": recording(toy.site_key()),
        },
        {"augment": augment},
    ),
    "drawn": (
        MODEL,
        {("input", "hidden2"): recording(fixed_lpa("free")), "logits": recording(identity())},
    ),
    "chain": (
        MODEL,
        {
            "hidden1": lpa_jax.chain(
                recording(fixed_lpa("free")),
                recording(stateless("shift", lambda site: (site.activation + 1.0, site.targets))),
            ),
            "logits": recording(identity()),
        },
    ),
    "bfloat16": (
        MLP(CLASSES, hidden=(8, 6), dtype="bfloat16"),
        {"hidden1": recording(lpa_jax.lpa(RADIUS, mode="free"))},
    ),
}


class Run(NamedTuple):
    state: lpa_jax.TrainState
    step: object

    def after(self, steps, batch=None):
        state = self.state
        for _ in range(steps):
            state, _ = self.step(state, toy.batch() if batch is None else batch)
        return state


def start(model, perturbations, options=None, batch=None):
    state = lpa_jax.TrainState.create(
        model, OPTIMIZER, jax.random.key(0), batch or toy.batch(), perturbations
    )
    step = functools.partial(lpa_jax.lpa_step, perturbations=perturbations, **(options or {}))
    return Run(state, jax.jit(step))


@functools.cache
def run(name):
    return start(*RUNS[name])


def cross_entropy(logits, targets):
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


@functools.partial(jax.jit, static_argnames="layer")
def encode(params, layer="hidden1"):
    return MODEL.apply({"params": params}, toy.batch()["image"], train=True, stop=layer)


@functools.partial(jax.jit, static_argnames="layer")
def decode(params, h, layer="hidden1"):
    return MODEL.apply({"params": params}, h, train=True, start=layer)


@functools.cache
def evaluate():
    return jax.jit(lpa_jax.eval_step)


def trained(state):
    return state.params, state.opt_state
