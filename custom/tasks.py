"""Names of the tasks that a server gives its sites, and of what stands in them beside a model's tensors."""

RELEASE = "release"  # the mean image before training, under differential privacy
TRAIN = "train"
EVALUATE = "evaluate"
DECRYPT = "decrypt"  # the sum of encrypted updates, in an encrypted job
SECAGG = "secagg"  # a stage of secure aggregation that has no work of its own
AUDIT_RANGE = "audit_range"  # the four of a federated audit: custom.audit_counts
AUDIT_TUNE = "audit_tune"
AUDIT_REPORT = "audit_report"
AUDIT_COPIES = "audit_copies"

# uint8 images [N, 1, *spatial].
SAMPLES = "samples"
UNTRAINED_SAMPLES = "untrained_samples"
