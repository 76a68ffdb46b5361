"""A site's policy, asked about a job before any of the site's patients are."""

from __future__ import annotations

from custom.config import ExperimentConfig
from custom.egress import statistics_that_leave
from custom.job_plan import privacy_plan
from privacy.policy import PrivacyPolicy


def ask_policy(policy: PrivacyPolicy, experiment: ExperimentConfig) -> int:
    """Let a job pass, or raise; with as many patients as the policy and the job's plan need.

    The executor asks again, with the number of patients that there are, before it does anything.

    Returns:
        That number.

    Raises:
        PolicyRefused: naming the rule.
    """
    asked = experiment.secure_aggregation
    rules, leaves = None if asked is None else asked.rules, statistics_that_leave(experiment)
    if experiment.audit is not None:
        policy.check_audit(patients=policy.min_patients, leaves=leaves, secure_aggregation=rules)
        return policy.min_patients
    plan = privacy_plan(experiment)
    patients = max(policy.min_patients, 1 if plan is None else plan.patients)
    rounds = experiment.federation.rounds
    policy.check(plan, patients=patients, rounds=rounds, leaves=leaves, secure_aggregation=rules)
    return patients
