"""Samples held against the patients of one population: which are too close, and what the site may see of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from custom.audit_config import AuditConfig
from custom.pictures import grey_levels
from privacy.audit.embedding import train_embedding
from privacy.audit.evidence import CopyOutcome
from privacy.audit.memorization import CopyScreen, copy_screens
from privacy.audit.population import Population
from privacy.audit.report.gallery import Gallery, Pair


def screened(
    samples: NDArray[np.float32],
    population: Population,
    config: AuditConfig,
    *,
    device: torch.device,
    progress: bool,
) -> tuple[CopyScreen, CopyScreen]:
    """The screens by embedding, trained on the population's images of both kinds, and by pixels.

    Raises:
        Unattackable: fewer than two members or held-outs.
    """
    embedding = train_embedding(
        population.images,
        population.patient,
        steps=config.embedding_steps,
        seed=config.seeds[0],
        device=str(device),
        progress=progress,
    )
    of_member = population.member[population.patient]
    return copy_screens(
        samples,
        train=population.images[of_member],
        train_patient=population.patient[of_member],
        held_out=population.images[~of_member],
        held_out_patient=population.patient[~of_member],
        embed=embedding,
        seed=config.seeds[0],
    )


def copy_outcome(screen: CopyScreen) -> CopyOutcome:
    """What may be told of a screen."""
    return CopyOutcome(
        method=screen.method,
        samples=screen.samples,
        copies=screen.copies_train,
        copies_matched=screen.copies_train_matched,
        control_matched=screen.copies_held_out_matched,
        p_value=screen.p_value,
        withhold=screen.withhold,
    )


def gallery(screens: Sequence[CopyScreen], samples: NDArray[np.float32], population: Population) -> Gallery:
    """The nearest pairs by embedding, for the site's own eyes; of volumes the middle slices."""
    train = population.images[population.member[population.patient]]
    return Gallery(
        pairs=tuple(
            Pair(
                sample=near.sample,
                similarity=near.similarity,
                sample_image=_slice(samples[near.sample]),
                patient_image=_slice(train[near.train]),
            )
            for near in screens[0].nearest
        )
    )


def _slice(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    plane = image if image.ndim == 3 else image[:, image.shape[1] // 2]
    levels: NDArray[np.uint8] = grey_levels(plane[None])[0, 0]
    return levels
