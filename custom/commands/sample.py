"""``fedct sample``: draw slices or volumes from a model and write them as PNG, NIfTI or DICOM."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from custom.model_config import SamplingConfig


def register(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "sample",
        help="draw images from a model",
        description="Draw images, slices or volumes as the model makes them, and write each as PNG (a volume's middle "
        "planes), NIfTI or DICOM (marked as synthetic), with a grid of all. The same seed gives the same images.",
    )
    parser.add_argument("model", type=Path, help="model.safetensors of a run")
    parser.add_argument("out", type=Path, help="folder to write to; must not exist yet")
    parser.add_argument("--count", type=int, default=16, help="number of images (default: %(default)s)")
    parser.add_argument("--format", choices=("png", "nifti", "dicom"), default="png", help="default: %(default)s")
    parser.add_argument("--sampler", choices=("ddpm", "ddim", "dpm_solver"), default="dpm_solver")
    parser.add_argument("--steps", type=int, default=20, help="network evaluations per image (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--pixel-mm",
        type=float,
        help="nominal pixel size of slices in NIfTI and DICOM: training scales every body to the frame, so the true "
        "one is not known (default: 6); volumes have the voxel size of training",
    )
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Draw and write."""
    from custom.device import use
    from custom.drawing import draw
    from custom.export import NOMINAL_MM, export_samples
    from custom.model_file import load_model
    from custom.pictures import sample_grid, viewable
    from custom.site_file import HardwareConfig
    from custom.strict import require

    sampling = SamplingConfig(sampler=options.sampler, steps=options.steps)
    model = load_model(options.model)
    preprocess = model.experiment.preprocess
    spacing = preprocess.spacing_mm or NOMINAL_MM
    if options.pixel_mm is not None:
        remedy = f"leave it out: the model's volumes have voxels of {spacing} mm"
        require(preprocess.spatial_dims == 2, argument="--pixel-mm", value=options.pixel_mm, remedy=remedy)
        spacing = (options.pixel_mm, options.pixel_mm, options.pixel_mm)
    device = use(HardwareConfig())
    images = draw(model, count=options.count, device=device, sampling=sampling, seed=options.seed, progress=True)
    files = export_samples(
        images,
        options.out,
        format=options.format,
        window_hu=preprocess.window_hu,
        spacing_mm=spacing,
        seed=options.seed,
    )
    grid = options.out / "grid.png"
    title = f"{model.experiment.name}: {len(images)} samples"
    sample_grid(viewable(images, preprocess), grid, title=title, window_hu=preprocess.window_hu)
    print(f"{len(files)} {options.format} files in {options.out}\n{grid}")
    return 0
