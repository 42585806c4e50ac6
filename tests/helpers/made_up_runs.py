"""Small made-up result folders for the tests of reports and sweeps."""

import json
import pathlib

SETTINGS = {"dataset": "digits", "evaluate_on": "test", "profile": "exponential", "imbalance": 10.0,
            "per_class": None, "model": "mlp", "epochs": 2}  # fmt: skip


def write(folder, method, seed, accuracy, *, options=None, settings=None, **result):
    """A complete run of three classes; its folder. `settings` and `result` add to the usual."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    config = {"method": method, "seed": seed, "options": options or {},
              "settings": SETTINGS | (settings or {}), "train_counts": [30, 10, 3]}  # fmt: skip
    usual = {
        "complete": True,
        "method": method,
        "seed": seed,
        "seconds": 2.0,
        "train_counts": [30, 10, 3],
        "accuracy": accuracy,
        "per_class_accuracy": [min(1.0, accuracy + 0.2), accuracy, max(0.0, accuracy - 0.2)],
        "group_accuracy": {"many": accuracy + 0.1, "medium": accuracy, "few": accuracy - 0.1},
        "curve": [
            {"epoch": epoch, "step": 2 * epoch, "train/loss": 1.0 / epoch,
             "evaluation/accuracy": accuracy * epoch / 2}
            for epoch in (1, 2)
        ],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps(usual | result))
    return folder


def write_many(root, accuracies, **kwargs):
    """Runs of several methods: {method: [accuracy of seed 0, of seed 1, ...]}."""
    for method, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            write(pathlib.Path(root, method, f"seed_{seed}"), method, seed, accuracy, **kwargs)


def write_domain_run(folder, method, seed, test_domain, **selections):
    """A complete run of domain generalization, with an accuracy for each model selection."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    settings = {"dataset": "rotated_mnist", "model": "small_cnn", "evaluate_on": "test"}
    config = {"method": method, "seed": seed, "options": {}, "settings": settings,
              "test_domain": test_domain, "drawn_options": [{"seed": seed}]}  # fmt: skip
    result = {"complete": True, "method": method, "seed": seed, "test_domain": test_domain,
              "domain_accuracy": {"d0": 0.9, "d15": 0.9}, "selections": selections}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps(result))
    return folder
