"""The membership-inference audit: how much a model, its samples or its updates say about single patients.

Knows neither a network nor NVFlare: a model arrives as a callable. An audit falsifies and never certifies: it says what
these attacks, at this power, found.

    errors         what the audit refuses
    population     whose images are attacked: members and held-outs, split by patient
    attacks        grey box: the denoiser may be queried
    gradients      white box: per-image gradient norms
    calibration    scores against reference models and against what an image's difficulty would suggest
    stacking       one attacker from many scores
    embedding      a self-supervised embedding of slices
    memorization   black box: samples that are too close to a patient
    updates        a curious server that sees updates: loss slope, gradient cosine, inversion
    canaries       coin-flipped inclusion, committed before training
    bounds         lower bounds on ε
    statistics     AUC, operating points, intervals
    blind          a classifier that never sees the model
    protocol       tuning half, report half, seeds, controls
    pooling        the same from counts that sites send
    decision       from evidence to a verdict
    evidence       what an audit found, as audit.json
    report         audit.json, audit.html and audit.pdf
"""
