"""Sum of encrypted updates, each added as it arrives."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from custom.config import ExperimentConfig
from custom.diffusion.networks import Shapes
from custom.egress import EgressRefused, check_arrays, check_meta
from custom.he_contexts import COEFF_MOD_BIT_SIZES, tenseal
from custom.he_packing import packed_name, packed_size


class EncryptedSum:
    """[Σ w·u, Σ w] of one round under encryption, one ciphertext whatever the number of sites.

    Nothing can be seen of a single update here, its norm neither: that was checked at the site, and is checked of the
    mean.

    Args:
        shapes: names and shapes of the tensors inside.
        config: the experiment.
        context: the server's TenSEAL context, which has no secret key.
    """

    def __init__(self, shapes: Shapes, config: ExperimentConfig, context: Any) -> None:
        self._shapes = shapes
        self._config = config
        self._context = context
        self._name, self._size = packed_name(shapes), packed_size(shapes)
        self._lock = threading.Lock()
        self._total: Any = None
        self._mean: dict[str, NDArray[np.float32]] | None = None
        self.accepted: dict[str, dict[str, float]] = {}
        self.refused: dict[str, str] = {}
        self.metrics: dict[str, float] = {}  # each site's are known

    def add(self, site: str, arrays: Any, meta: Mapping[str, Any]) -> bool:
        """Add a reply if all of it is one ciphertext of this job, or refuse it by the site's name.

        Args:
            site: who sent it, as NVFlare authenticated it.
            arrays: the ciphertext as bytes, under its one name.
            meta: ``weight``, which is 1, and ``metrics``.

        Returns:
            Whether it was added. A second reply of the same site is refused.
        """
        with self._lock:
            try:
                if site in self.accepted:
                    raise EgressRefused("a second reply in one round")
                vector = self._vector(arrays)
                check_meta(meta, config=self._config, encrypted=True)
                self._total = vector if self._total is None else self._added(vector)
            except EgressRefused as error:
                self.refused[site] = str(error)
                return False
            self.accepted[site] = {name: float(value) for name, value in meta["metrics"].items()}
            return True

    def ciphertext(self) -> tuple[str, bytes]:
        """Name and bytes of the sum; raises ``ValueError`` if there is none."""
        if self._total is None:
            raise ValueError("accepted = 0: no update to add; see the refusals of the round")
        return self._name, self._total.serialize()

    def open_with(self, mean: Any) -> None:
        """Take the mean that a site has made of the sum.

        Raises:
            EgressRefused: other names, shapes or types, numbers that are not finite, or too long for a mean.
        """
        if not isinstance(mean, Mapping):
            raise EgressRefused("no weight difference in it")
        check_arrays(mean, shapes=self._shapes, max_norm=self._config.federation.max_update_norm)
        self._mean = dict(mean)

    def mean(self) -> dict[str, NDArray[np.float32]]:
        """The weighted mean, by name; raises ``ValueError`` before a site has opened the sum."""
        if self._mean is None:
            raise ValueError("mean = not there: no site has opened the sum yet")
        return self._mean

    def _vector(self, arrays: Any) -> Any:
        if not isinstance(arrays, Mapping):
            raise EgressRefused("no weight difference in it")
        for name, value in arrays.items():
            if type(value) is not bytes:
                raise EgressRefused(f"tensor {str(name)[:80]!r}: not encrypted; the job's filters must be as it says")
        if set(arrays) != {self._name}:
            raise EgressRefused(f"tensors: must be {self._name!r} and nothing else")
        try:
            vector = tenseal().ckks_vector_from(self._context, arrays[self._name])
        except (ValueError, RuntimeError) as error:
            raise EgressRefused(f"tensor {self._name!r}: no ciphertext of this federation's parameters") from error
        if vector.size() != self._size:
            raise EgressRefused(f"tensor {self._name!r}: {vector.size()} numbers encrypted, must be {self._size}")
        # One of another scale or level would make all that come after it impossible to add.
        if any(part.scale != self._context.global_scale or not _fresh(part) for part in vector.ciphertext()):
            raise EgressRefused(f"tensor {self._name!r}: must be fresh ciphertext at the context's scale")
        return vector

    def _added(self, vector: Any) -> Any:
        try:
            return self._total + vector  # a new ciphertext: one that cannot be added leaves the sum as it was
        except (ValueError, RuntimeError) as error:
            raise EgressRefused(f"tensor {self._name!r}: cannot be added to the others") from error


def _fresh(part: Any) -> bool:
    """Two polynomials over all primes but the special one, and not the kind that anybody can read."""
    sizes = part.size(), part.coeff_modulus_size()
    return sizes == (2, len(COEFF_MOD_BIT_SIZES) - 1) and not part.is_transparent()
