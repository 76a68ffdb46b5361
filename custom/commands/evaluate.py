"""``fedct evaluate``: how close a model's samples come to a site's held-out patients."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def register(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "evaluate",
        help="compare a model's samples with held-out patients",
        description="Draw samples, slices or volumes, from a model and compare them with the held-out patients of a "
        "site: EffNet-KID and -FD, precision and recall, MS-SSIM diversity, of volumes whether neighbouring slices "
        "belong together; beside real training patients (what perfection would score) and the untrained network.",
    )
    parser.add_argument("model", type=Path, help="model.safetensors of a run")
    parser.add_argument("--site-file", type=Path, required=True, help="the site file (TOML)")
    parser.add_argument("--site", action="append", required=True, help="whose patients; repeat to pool several sites")
    parser.add_argument("--count", type=int, default=256, help="number of samples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--inception-weights",
        type=Path,
        help="the original FID Inception weights, for true FID; torch-fidelity unpickles them: a trusted file only",
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--picture", type=Path, help="also write held-out images beside samples (patient data!)")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Sample, compare, print."""
    import numpy as np

    from custom.device import use
    from custom.drawing import draw
    from custom.evaluation import evaluate
    from custom.model_file import initial_model, load_model
    from custom.pictures import real_and_generated, viewable
    from custom.site_file import HardwareConfig, load_site
    from custom.volume_evaluation import evaluate_volumes
    from medical_data.cohort import prepare_cohort

    model = load_model(options.model)
    experiment = model.experiment
    cohorts = []
    for name in options.site:
        site = load_site(options.site_file, name)
        cohorts.append(
            prepare_cohort(
                source=site.source, preprocess=experiment.preprocess, limits=site.limits, home=site.home, progress=True
            )
        )
    held_out = np.concatenate([cohort.images[cohort.rows("held_out")] for cohort in cohorts])
    train = np.concatenate([cohort.images[cohort.rows("train")] for cohort in cohorts])
    device = use(HardwareConfig())
    generated, noise = (
        draw(each, count=options.count, device=device, seed=options.seed, progress=True)
        for each in (model, initial_model(experiment))
    )
    judge = evaluate if experiment.preprocess.spatial_dims == 2 else evaluate_volumes
    result = judge(
        generated,
        held_out,
        train=train,
        untrained=noise,
        images_per_patient=max(int(np.bincount(cohort.patient).max()) for cohort in cohorts),
        seed=options.seed,
        inception_weights=options.inception_weights,
        progress=True,
    )
    print(result.table())
    if options.json is not None:
        options.json.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    if options.picture is not None:
        rows = np.linspace(0, len(held_out) - 1, min(16, len(held_out))).round().astype(int)
        real, samples = (viewable(images, experiment.preprocess) for images in (held_out[rows], generated[:16]))
        real_and_generated(real, samples, options.picture, window_hu=experiment.preprocess.window_hu)
    return 0
