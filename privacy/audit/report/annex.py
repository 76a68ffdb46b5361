"""What every report says: its limits, its words, and what it gives to an impact assessment."""

from __future__ import annotations

from privacy.audit.decision import NO_LEAK
from privacy.audit.evidence import Evidence
from privacy.audit.report.blocks import Block, Facts, Heading, Paragraph
from privacy.audit.report.wording import area, percent

LIMITS = (
    "An audit falsifies and never certifies. It shows leaks that it finds; it cannot show that there are none. "
    "The best "
    f"that it can say is: {NO_LEAK}.",
    "Attacks that are not listed here, or stronger ones that are not known yet, may find more. Attackers who know a "
    "patient from elsewhere, or who hold many images of one, are stronger than those here.",
    "Intervals are over patients, taken as drawn alike. They say nothing of patients unlike these, such as those of "
    "another hospital.",
    "Figures over single images are less certain than they look: images of one patient resemble each other.",
    "A lower bound on ε may be far below the true one. A claimed ε is a statement about the worst patient; an "
    "AUC is one "
    "about the average.",
    "Under a federated audit the sites' counts are taken as sent, and who runs an audit may run several and show one.",
    "A verdict is about this model file and these patients, by their hashes. Another round of training needs "
    "another audit.",
)

GLOSSARY = (
    ("Member, held out", "A patient whom the model was trained on; one whom it never saw."),
    (
        "AUC",
        "Shown one of each, how often an attack takes the right one for the member. 0.5 is guessing, 1 is never wrong.",
    ),
    (
        "TPR at 1\u00a0% FPR",
        "Of the members, the share that an attack names if it may be wrong about one held-out patient in a hundred.",
    ),
    ("95\u00a0% interval", "Made by a method that covers the true value in 95 of 100 audits."),
    ("p", "How often chance alone would look at least as good as this."),
    (
        "ε and δ",
        "Differential privacy: with or without a given patient, every outcome of the training is about equally "
        "likely, up "
        "to a factor of e to the ε, but for a probability δ. Smaller is more private.",
    ),
    ("Canary", "An artificial image, in training or not by the toss of a coin that was committed to beforehand."),
)


def dpia(evidence: Evidence) -> tuple[Block, ...]:
    """Findings beside the questions of EDPB Opinion 28/2024 and of WP 216; no legal conclusion is drawn."""
    attack = evidence.attacks[evidence.strongest]
    auc = area(attack.outcome.patient_auc)
    copies = "; ".join(
        f"{c.copies} of {c.samples} candidates by {c.method}, p = {c.p_value:.3g}" for c in evidence.copies
    )
    seen = {"central": "This audit saw all images on one machine.", "federated": "This audit saw counts only."}
    noise = "no differential privacy"
    if evidence.privacy is not None:
        bounds = [bound.epsilon for bound in evidence.privacy.lower_bounds]
        tested = f"canaries show at least {max(bounds):.2f}" if bounds else "the claim was not tested with canaries"
        noise = f"ε = {evidence.privacy.epsilon:.2f}, δ = {evidence.privacy.delta:g}; {tested}"
    return (
        Paragraph(
            "This annex sorts the findings by questions that supervisory authorities ask. It is input to the "
            "controller's "
            "own assessment and no substitute for it; whether a likelihood is insignificant is not decided here."
        ),
        Heading("EDPB Opinion 28/2024 on AI models"),
        Facts(
            (
                (
                    "Likelihood that personal data of the training set are extracted from the model itself",
                    f"Membership attacks with access to the model: {attack.title}, AUC {auc}. Whole images were "
                    f"looked for "
                    "among the samples only. Not measured: extraction by optimising inputs to the weights.",
                ),
                (
                    "Likelihood that personal data are obtained from queries, intended or not",
                    f"Copy screen of samples: {copies or 'not run'}.",
                ),
                (
                    "Means reasonably likely to be used",
                    "Published attacks with access to samples, interface, weights and updates, as listed; a "
                    "budget of one "
                    "machine. Not covered: what somebody could combine with other data about a patient.",
                ),
                (
                    "Measures in training",
                    f"{noise}. The split into members and held-outs is by patient. {seen[evidence.scope]}",
                ),
                (
                    "Documentation",
                    "audit.json holds all figures and the rule; hashes name model, configuration and manifests.",
                ),
            )
        ),
        Heading("Opinion 05/2014 (WP 216) on anonymisation techniques: three risks"),
        Facts(
            (
                (
                    "Singling out",
                    f"Measured as membership: AUC {auc}; of {attack.worst.members} members, "
                    f"{attack.worst.above_all_held_out} score above every held-out patient.",
                ),
                (
                    "Linkability",
                    "Measured between samples and patients (copy screen). Not measured: whether two records of "
                    "one patient "
                    "at different sites can be linked through the model.",
                ),
                (
                    "Inference",
                    "Membership is itself an inference where the cohort has a diagnosis in common. Not "
                    "measured: inference "
                    f"of other attributes. {percent(attack.worst.held_out_above_95th)} of the held-outs hide "
                    f"the most "
                    "exposed 5\u00a0% of the members.",
                ),
            )
        ),
    )
