"""What can go wrong between a file and a volume.

MedicalDataError
├── UnreadableFolder              nothing to read from
├── InsecureSecret                the site's secret is not a secret
└── SeriesRefused                 one series is refused, the others go on
    │   what it is
    ├── NotCT                     another modality, another object, a label mask
    ├── Localizer                 scout, topogram
    ├── DerivedMap                perfusion, projection, subtraction, material map
    ├── BurnedInAnnotation        text in the pixels
    ├── MissingPatientID          nobody to attribute it to
    ├── MixedSeries               files that do not belong together
    │   the file
    ├── UnreadableFile            cannot be opened or parsed
    ├── TruncatedFile             ends too early
    ├── UndecodableTransferSyntax no decoder for this compression
    ├── CorruptPixels             the decoder failed
    ├── MissingAttribute
    │   └── MissingRescale        no RescaleSlope or RescaleIntercept
    ├── MalformedAttribute
    │   the values
    ├── NotHounsfield             RescaleType is another unit
    ├── CoarseHU                  too few grey levels
    ├── ImpossibleHU
    │   the geometry
    ├── ImpossibleGeometry
    ├── MixedOrientations
    ├── GantryTilt
    ├── DuplicateSlices
    ├── MissingSlices
    └── UnevenSpacing

``str(error)`` names attribute, value and remedy and is free of file names and patient data; the file stands
in ``error.file`` for the site's own report.
"""

from __future__ import annotations

from pathlib import Path


class MedicalDataError(Exception):
    """Base of every refusal of this package.

    Args:
        attribute: what was looked at (DICOM keyword, argument name).
        value: what was found; never a patient identifier.
        remedy: what to do next.
        file: where, for the site's own report only; not part of the message.
    """

    def __init__(self, *, attribute: str, value: object, remedy: str, file: Path | None = None) -> None:
        super().__init__(f"{attribute} = {value}: {remedy}")
        self.attribute = attribute
        self.value = value
        self.remedy = remedy
        self.file = file


class UnreadableFolder(MedicalDataError):
    """The folder to read from is not a folder."""


class InsecureSecret(MedicalDataError):
    """The file with the site's secret has the wrong size or can be read by others."""


class SeriesRefused(MedicalDataError):
    """A series that cannot be used; ``type(error).__name__`` is the reason's code."""


class NotCT(SeriesRefused):
    """Another modality or object than a CT image, or a label mask beside one."""


class Localizer(SeriesRefused):
    """A scout (topogram): a projection, not a slice."""


class DerivedMap(SeriesRefused):
    """Computed from CT, not attenuation at a place: perfusion, projection, subtraction, material map."""


class BurnedInAnnotation(SeriesRefused):
    """Text in the pixels, which may identify the patient."""


class MissingPatientID(SeriesRefused):
    """No patient to attribute the series to: split and privacy accounting are by patient."""


class MixedSeries(SeriesRefused):
    """Files of different patients, series, frames of reference or sizes under one series."""


class UnreadableFile(SeriesRefused):
    """A file that cannot be opened or parsed at all."""


class TruncatedFile(SeriesRefused):
    """A file that ends before its pixel data do."""


class UndecodableTransferSyntax(SeriesRefused):
    """A compression for which no decoder is installed or known."""


class CorruptPixels(SeriesRefused):
    """Pixel data that are there but that the decoder cannot make sense of."""


class MissingAttribute(SeriesRefused):
    """A required attribute is absent or empty."""


class MissingRescale(MissingAttribute):
    """No RescaleSlope or RescaleIntercept: stored values cannot be turned into Hounsfield units."""


class MalformedAttribute(SeriesRefused):
    """An attribute is there but its value cannot be what the standard asks for."""


class NotHounsfield(SeriesRefused):
    """The rescaled values are of another unit than Hounsfield."""


class CoarseHU(SeriesRefused):
    """One grey level spans more Hounsfield units than tissues differ by."""


class ImpossibleHU(SeriesRefused):
    """Voxels that are not finite or not Hounsfield units of anything."""


class ImpossibleGeometry(SeriesRefused):
    """Spacing or orientation that no scanner has."""


class MixedOrientations(SeriesRefused):
    """Slices of one series that are not parallel."""


class GantryTilt(SeriesRefused):
    """Slices that are stacked along another line than their normal."""


class DuplicateSlices(SeriesRefused):
    """Two slices at one position: repeated files, phases or reconstructions under one series."""


class MissingSlices(SeriesRefused):
    """A gap of a whole number of slice distances."""


class UnevenSpacing(SeriesRefused):
    """Slice positions that do not lie on a regular grid."""
