"""What stands in every report: limits, glossary, and input to the controller's impact assessment.

The opinions: European Data Protection Board, Opinion 28/2024 of 17 December 2024; Article 29 Working Party, Opinion
05/2014 of 10 April 2014 (WP216).
"""

from __future__ import annotations

from privacy.audit.decision import NO_LEAK, DecisionRule
from privacy.audit.evidence import Access, Evidence
from privacy.audit.report import wording
from privacy.audit.report.blocks import Bullets, Facts, Heading, Paragraph, Section, Table


def limits(evidence: Evidence, rule: DecisionRule) -> Section:
    """What the audit cannot say."""
    cut_offs = (
        f"an AUC above {rule.green_auc:g} or a TPR at 1\u00a0% FPR above {wording.target(rule.green_tpr_at_1_percent)}"
    )
    items = [
        f'An audit falsifies and never certifies. The most that it can say is "{NO_LEAK}".',
        "Stronger attackers may exist: with more reference models, with other data about the same patients, with "
        "attacks that nobody has published yet, or with more computing time.",
        f"Power: {evidence.report_members} members and {evidence.report_held_out} held-outs decide how small a leak can be "
        f"seen. GREEN excludes {cut_offs} for these attacks; smaller leaks are not excluded.",
        "Intervals hold for patients like these, drawn independently of each other. They resample or count patients, not "
        "images. They do not cover the choice of cohort, of model or of training run: another training of the same "
        "configuration may leak more or less.",
        "The figures are averages over patients, and no average protects the one who stands out. The section on the most "
        "exposed patients looks for such ones and cannot find all.",
        "Held-outs stand for everyone whom the model never saw. People of another region, scanner or disease may be told "
        "from members more easily, and by their images alone.",
        "Membership is what is tested. Attributes of a patient (age, sex, a finding) are not.",
    ]
    if evidence.scope == "federated":
        items.append(
            "The sites' counts are taken as sent. A site that counts wrongly, by mistake or on purpose, changes the result."
        )
    if evidence.privacy is not None:
        items.append(
            "Lower bounds on ε are those of canaries under these attacks. They refute a claim or fail to; the claim itself "
            "rests on the proof behind the plan, and on the program doing what the plan says."
        )
    return Section(name="limits", title="What this audit cannot say", blocks=(Bullets(tuple(items)),))


def assessment(evidence: Evidence) -> Section:
    """What the findings contribute to a data protection impact assessment."""
    weights = _strongest(evidence, "weights")
    queries = _strongest(evidence, "api")
    copies = _copies(evidence)
    held = "the held-out patients' images, and for half of all patients the knowledge who is a member"
    most = max((attack.evaluations_per_image for attack in evidence.attacks), default=0)
    opinion = (
        (
            "Likelihood that personal data of people whose data trained the model are extracted from it directly, also "
            "with probabilities",
            f"Membership of single patients: {weights}{_canaries(evidence)}{_inversions(evidence)}",
            "Extraction of attributes. Reconstruction of a patient's images from the finished weights. Attacks other than "
            "those listed.",
        ),
        (
            "Likelihood of obtaining such data from queries, on purpose or not",
            f"{copies} Membership through queries: {queries}",
            "Samples other than those drawn, and prompts or guidance that were not tried. Likeness that the two measures "
            "of the screen do not see.",
        ),
        (
            "All the means reasonably likely to be used, by the controller or by someone else",
            f"Attackers who hold {held}, and who spend up to {most:g} U-Net evaluations an image. That is more knowledge "
            "than most would have.",
            "Which of these means are reasonably likely in the context of the release: who receives the model, under what "
            "contract and supervision. Other sources that could be combined. Techniques to come.",
        ),
        (
            "Documentation, to account for the assessment",
            "The rule and its cut-offs, fixed beforehand; every figure in audit.json, from which the verdict can be "
            "computed again; hashes of model, configuration and cohorts; the command to repeat the audit.",
            "Choice and minimisation of the training data, governance, access control, contracts, and the assessment "
            "itself.",
        ),
    )
    triad = (
        (
            "Singling out: isolating records that identify a person",
            f"Whether a patient's membership can be told: {weights} Members above every held-out are counted under the "
            f"most exposed patients. {copies}",
            "Whether a person can be found in the model without the attacker holding an image of that person.",
        ),
        (
            "Linkability: connecting two records of one person or group",
            f"Whether a sample can be connected with a patient's images. {copies} Scores of slices are joined by patient: "
            "the AUC over patients is what several images of one person give together.",
            "Links to other archives, registers or models. Whether two samples belong to one patient.",
        ),
        (
            "Inference: deducing an attribute with significant probability",
            f"One attribute: having been a patient of the cohort. Where the cohort means a disease, that is "
            f"information about health. {weights}",
            "All other attributes, such as age, sex or findings.",
        ),
    )
    columns = ("Question", "What this audit measured", "What it did not")
    return Section(
        name="assessment",
        title="Annex: input to the data protection impact assessment",
        blocks=(
            Paragraph(
                "This annex sorts the findings by the questions of two opinions. It draws no legal conclusion. It is input "
                "to the controller's own assessment and no substitute for it; that assessment is made case by case, and "
                "the competent authority may judge it."
            ),
            Heading("EDPB Opinion 28/2024 on AI models (17 December 2024)"),
            Paragraph(
                "The Opinion asks that two likelihoods be insignificant for each person whose data trained the model, "
                "considering all the means reasonably likely to be used."
            ),
            Table("By the questions of Opinion 28/2024", columns, opinion, (28, 52, 40)),
            Heading("Article 29 Working Party, Opinion 05/2014 (WP216)"),
            Table("By the three risks of WP216", columns, triad, (28, 52, 40)),
        ),
    )


def glossary() -> Section:
    """The words of the field."""
    rows = (
        (
            "AUC",
            "Area under the ROC curve: the probability that a member scores higher than someone who is none. 0.5 is "
            "guessing, 1 is certainty.",
        ),
        (
            "TPR at 1\u00a0% FPR",
            "The true positive rate (share of members who are found) of an attack that takes one in a hundred others for a "
            "member (false positive rate). A harmful attack can have an AUC near 0.5 and yet find a few with near "
            "certainty; this figure shows it.",
        ),
        (
            "Not resolvable",
            "Too few patients: among so few non-members a false positive rate that small cannot be told from zero.",
        ),
        (
            "ε (epsilon)",
            "Differential privacy: with or without one patient, no result of training becomes more than e^ε times as "
            "likely, apart from δ. Smaller is more private; 0 means that nothing depends on the patient.",
        ),
        ("δ (delta)", "A probability that is exempt from the promise of ε. It must lie far below one in the patients."),
        (
            "95\u00a0% interval",
            "Made by a method that covers the true value in 95 of 100 audits like this one. A wide one means few patients.",
        ),
        (
            "p",
            "How often chance alone would give a result at least as strong. Corrected: for how many attacks were tried.",
        ),
        ("Member, held-out", "A patient whom the model was trained on; one of the same site whom it never saw."),
        (
            "Canary",
            "A record whose inclusion in training a coin decided, so that what the model remembers can be counted.",
        ),
        ("Control", "A model of which the right answer is known beforehand."),
        ("RDLV, SSIM", "Relative data leakage value; structural similarity of two images, 1 if they are the same."),
        ("U-Net evaluation", "One pass of one image through the network: the price of an attack."),
    )
    return Section(name="glossary", title="Glossary", blocks=(Facts(rows),))


def _strongest(evidence: Evidence, access: Access) -> str:
    attack = wording.strongest(evidence.attacks, access)
    return (
        "no attack was run." if attack is None else f"{attack.title}, AUC {wording.area(attack.outcome.patient_auc)}."
    )


def _copies(evidence: Evidence) -> str:
    if not evidence.copies:
        return "No samples were screened for copies."
    found = " and ".join(
        f"{c.copies} of {c.samples} ({c.method}, p = {wording.p_value(c.p_value)})" for c in evidence.copies
    )
    return f"Samples too close to a member: {found}."


def _canaries(evidence: Evidence) -> str:
    bounds = () if evidence.privacy is None else evidence.privacy.lower_bounds
    return f" Canaries: ε ≥ {max(bound.epsilon for bound in bounds):.2f}." if bounds else ""


def _inversions(evidence: Evidence) -> str:
    found = "; ".join(f"{i.seen}, RDLV {i.rdlv:.2f}" for i in evidence.inversions)
    return f" Redrawn from updates: {found}." if found else ""
