"""Names of the tasks that a server gives its sites."""

RELEASE = "release"  # the mean image before training, under differential privacy
TRAIN = "train"
EVALUATE = "evaluate"
DECRYPT = "decrypt"  # the sum of encrypted updates, in an encrypted job
SECAGG = "secagg"  # a stage of secure aggregation that has no work of its own
