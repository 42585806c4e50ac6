"""Batches of several domains at once, a pure function of (seed, step) as in `batching`."""

from collections.abc import Sequence

import numpy as np

from lpa_jax import checks
from lpa_jax.data.batching import Batch, Examples, check_source, shared_evenly, take_at
from lpa_jax.data.example_stream import ExampleStream


class DomainBatches:
    """Training batches by step with equally many examples of each domain; see `domain_batches`."""

    def __init__(
        self,
        datasets: Sequence[Examples],
        streams: Sequence[ExampleStream],
        batch_size_per_domain: int,
        host_slice: tuple[int, int],
    ):
        self._datasets = datasets
        self._streams = streams
        self._per_domain = batch_size_per_domain
        self._host, hosts = shared_evenly(host_slice, batch_size_per_domain)
        self._share = batch_size_per_domain // hosts

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which the smallest domain has been seen whole: ceil(min_d N_d / B)."""
        return -(-min(map(len, self._datasets)) // self._per_domain)

    def indices(self, step: int) -> np.ndarray:
        """This host's examples as indices into each domain, int64 [D, B / hosts].

        Raises:
          ValueError: `step` is not a non-negative integer.
        """
        start = self._start(step)
        return np.stack([stream.indices(start, self._share) for stream in self._streams])

    def __getitem__(self, step: int) -> Batch:
        start = self._start(step)
        parts = [
            take_at(dataset, stream, start, self._share)
            for dataset, stream in zip(self._datasets, self._streams, strict=True)
        ]

        def interleaved(key):
            columns = np.stack([part[key] for part in parts], axis=1)
            return columns.reshape(-1, *columns.shape[2:])

        size = self._share * len(parts)
        places = np.arange(size, dtype=np.int32)
        return {
            "image": interleaved("image"),
            "label": interleaved("label"),
            "domain": places % len(parts),
            "position": places + np.int32(self._host * size),
        }

    def _start(self, step: int) -> int:
        step = checks.integer("step", step, minimum=0)
        return step * self._per_domain + self._host * self._share


def domain_batches(
    datasets: Sequence[Examples],
    seed: int,
    batch_size_per_domain: int,
    *,
    host_slice: tuple[int, int] = (0, 1),
) -> DomainBatches:
    """The training batches over several domains: `domain_batches(...)[step]`.

    Every domain has an endless stream of its own, epoch after epoch of its own length, of which
    batch s takes examples s*B .. (s+1)*B - 1. The domains take turns: example p of the global batch
    is of domain p mod D, so that every host, and every device that gets a multiple of D examples,
    has equally many of each.

    Formal guarantees: the same (data, seed, batch size, step) gives the same batch in any order of
    asking; every example occurs exactly once in each epoch of its domain; the slices of all hosts,
    concatenated, are the batch of a single host.

    Args:
      datasets: The D domains to train on, in memory or read as they are asked for; all images of
        one shape.
      seed: A non-negative integer.
      batch_size_per_domain: B, examples of each domain in the global batch of D*B (DomainBed: 32,
        and 64 for its MNIST sets); it may exceed the size of a domain.
      host_slice: (process_index, process_count); this host gets its contiguous part of each batch,
        B / process_count examples of each domain.

    Returns:
      `DomainBatches`: indexable by step, endless. A batch is {"image": [D*B, H, W, ch] as stored,
      "label": int32 [D*B], "domain": int32 [D*B], the place in `datasets`, "position": int32 [D*B],
      the place in the global batch, which keys augmentation}.

    Raises:
      ValueError: No domain, a value out of range, hosts that cannot share B evenly, or (when read)
        images of several shapes.

    Example:
      >>> images = np.zeros((4, 2, 2, 1), np.uint8)
      >>> from lpa_jax.data.dataset import Dataset
      >>> a, b = (Dataset(name, images, np.arange(4), num_classes=4) for name in "ab")
      >>> batch = domain_batches([a, b], seed=0, batch_size_per_domain=2)[0]
      >>> batch["domain"].tolist(), batch["label"].shape
      ([0, 1, 0, 1], (4,))

    References:
      Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021 (DomainBed).
    """
    datasets = tuple(check_source("datasets", datasets))
    for place, dataset in enumerate(datasets):
        check_source(f"datasets[{place}]", dataset)
    if not datasets:
        raise ValueError("datasets must hold at least one domain, got none")
    batch_size = checks.integer("batch_size_per_domain", batch_size_per_domain, minimum=1)
    streams = [ExampleStream(len(data), seed, key=(d,)) for d, data in enumerate(datasets)]
    return DomainBatches(datasets, streams, batch_size, host_slice)
