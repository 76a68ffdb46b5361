"""A site's scans become de-identified, patient-indexed HU volumes and slices."""
