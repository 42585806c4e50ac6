"""LPA in a text classifier: tokens and a mask, at a block that returns a tuple.

    python docs/examples/text_classifier.py

Texts are docstrings of installed packages, classes the packages. The model is called as Hugging
Face's Flax models are; nothing in it is edited.
"""

import functools
import importlib
import inspect
import re
import zlib

import flax.linen as nn
import jax
import numpy as np
import optax

import lpa_jax

PACKAGES = ("numpy", "optax", "flax.linen", "sklearn.metrics")
LENGTH, WORDS = 24, 500


class Block(nn.Module):
    """Self-attention that sees no padding, and a dense layer."""

    @nn.compact
    def __call__(self, hidden, mask, deterministic):
        """Return hidden states and attention mask, a tuple."""
        seen = nn.make_attention_mask(mask, mask)
        attend = nn.MultiHeadDotProductAttention(2, deterministic=deterministic)
        hidden = nn.LayerNorm()(hidden + attend(hidden, mask=seen))
        return hidden + nn.Dense(32)(nn.gelu(hidden)), seen


class Encoder(nn.Module):
    """A small BERT."""

    @nn.compact
    def __call__(self, input_ids, attention_mask, deterministic=True):
        """Return a dictionary with the logits [B, 4]."""
        hidden = nn.Embed(WORDS, 32)(input_ids)
        hidden, _ = Block(name="block")(hidden, attention_mask, deterministic)
        pooled = hidden.mean(axis=1, where=attention_mask[..., None] > 0)
        return {"last_hidden_state": hidden, "logits": nn.Dense(len(PACKAGES))(pooled)}


def texts():
    """Tokens, mask and package of the first words of every documented name."""
    found = []
    for label, package in enumerate(PACKAGES):
        for _, value in sorted(vars(importlib.import_module(package)).items(), key=lambda i: i[0]):
            words = re.findall("[a-z]+", (inspect.getdoc(value) or "").lower())[:LENGTH]
            found += [(label, words)] if callable(value) and words else []
    # A word's number is its hash; a text is filled up with -1.
    ids = [[zlib.crc32(word.encode()) % WORDS for word in words] for _, words in found]
    ids = np.array([row + [-1] * (LENGTH - len(row)) for row in ids])
    labels = np.array([label for label, _ in found])
    return {"ids": np.maximum(ids, 0), "mask": np.float32(ids >= 0), "label": labels}


def call(module, inputs, train, **rngs):
    """Call the model."""
    return module(inputs["ids"], inputs["mask"], deterministic=not train)


if __name__ == "__main__":
    whole = texts()
    order = np.random.default_rng(0).permutation(len(whole["label"]))
    train, test = ({k: v[part] for k, v in whole.items()} for part in np.split(order, [600]))
    counts = np.bincount(train["label"])

    network = lpa_jax.inject(Encoder(), "block", call=call, select={"block": 0})
    network = lpa_jax.with_batch_names(network, inputs=("ids", "mask"))
    lpa = lpa_jax.lpa(0.1, steps=1, shape="channel", assignment=lpa_jax.by_frequency(counts))
    placed, optimizer = {"block": lpa}, optax.adam(5e-3)
    state = lpa_jax.TrainState.create(network, optimizer, jax.random.key(0), train, placed)
    step = jax.jit(functools.partial(lpa_jax.lpa_step, perturbations=placed))
    for number in range(40):
        chosen = np.random.default_rng([0, number]).integers(0, 600, 64)
        state, _ = step(state, {name: values[chosen] for name, values in train.items()})
    measured = lpa_jax.metrics.compute(jax.jit(lpa_jax.eval_step)(state, test))
    print(f"accuracy {measured['accuracy']:.1%}, by package {measured['per_class_accuracy']}")
