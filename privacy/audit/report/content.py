"""The report's content, once: from an audit to blocks that HTML and PDF render."""

from __future__ import annotations

from collections.abc import Iterable

from privacy.audit.decision import ACCESS, DecisionRule
from privacy.audit.evidence import Access, AttackOutcome, ClaimedPrivacy, Evidence
from privacy.audit.report.annex import GLOSSARY, LIMITS, dpia
from privacy.audit.report.blocks import (
    Alert,
    Block,
    Bullets,
    Command,
    Details,
    Facts,
    Heading,
    Paragraph,
    Pictures,
    Report,
    Section,
    Table,
)
from privacy.audit.report.charts import auc_chart, epsilon_chart, ranked, roc_chart
from privacy.audit.report.document import Audit
from privacy.audit.report.gallery import WARNING, Gallery
from privacy.audit.report.wording import (
    HEADLINE,
    LADDER,
    MEANING,
    area,
    count,
    p_said,
    p_value,
    percent,
    reach,
    strongest,
    target,
    true_positives,
)

RELEASES: dict[Access, tuple[str, str]] = {
    "samples": ("Samples only", "Somebody gets synthetic images and nothing else."),
    "api": ("Access to the model through an interface", "Somebody may ask the model about images of their choice."),
    "weights": ("The weights", "Somebody gets the model file: a copy that cannot be called back."),
    "updates": ("The updates of every round", "A server, or whoever reads its disk, sees what sites send in training."),
}


def report_of(audit: Audit, gallery: Gallery | None) -> Report:
    """All that is said of an audit.

    Args:
        audit: evidence, rule and decision.
        gallery: pairs of samples and patients, for the site's own copy only.
    """
    evidence, decision = audit.evidence, audit.decision
    sections = [
        _reasons(audit),
        _subject(evidence),
        _threats(evidence),
        _attacks(evidence, audit.rule),
        _worst(evidence),
        _checks(evidence),
        _copies(evidence, gallery),
        _privacy(evidence.privacy),
        _updates(evidence),
        _sites(evidence),
        Section(name="limits", title="What this audit cannot say", blocks=(Bullets(LIMITS),)),
        Section(name="annex", title="Annex: input to a data protection impact assessment", blocks=dpia(evidence)),
        _rerun(evidence),
        Section(name="glossary", title="Words", blocks=(Facts(GLOSSARY),)),
    ]
    names = ", ".join(cohort.site for cohort in evidence.cohorts)
    return Report(
        title=f"Membership-inference audit of {evidence.model.experiment}",
        subtitle=f"{evidence.created}; patients of {names}",
        created=evidence.created,
        verdict=decision.verdict,
        headline=HEADLINE[decision.verdict],
        sentence=decision.sentence,
        meaning=MEANING[decision.verdict],
        summary=_summary(evidence),
        warning="" if gallery is None else WARNING,
        sections=tuple(section for section in sections if section.blocks),
    )


def _summary(evidence: Evidence) -> Facts:
    attack = evidence.attacks[evidence.strongest]
    rows = [
        ("Strongest attack", f"{attack.title}, with {ACCESS[attack.access]}"),
        ("Patient-level AUC (chance: 0.500)", area(attack.outcome.patient_auc)),
        ("Patients named at 1\u00a0% false alarms", true_positives(attack.outcome.points, 0.01)),
        (
            "Patients reported on",
            f"{evidence.report_members} members, {evidence.report_held_out} held out "
            f"(choices were made on {evidence.tuning_members} and {evidence.tuning_held_out} others)",
        ),
    ]
    if evidence.privacy is not None:
        rows.append(("Claimed differential privacy", _claim(evidence.privacy)))
    return Facts(tuple(rows))


def _claim(privacy: ClaimedPrivacy) -> str:
    return f"ε = {privacy.epsilon:.2f} at δ = {privacy.delta:g}, for a patient of one site"


def _reasons(audit: Audit) -> Section:
    rows = tuple((r.test, r.verdict, r.found, r.cut_off, r.meaning) for r in audit.decision.reasons)
    rule = audit.rule
    cut_offs = Facts(
        (
            ("INVALID", "A patient or image on both sides, a failed blind test, or a control with the wrong answer."),
            (
                "RED",
                "A lower bound on ε above the claim; or, with 95\u00a0% confidence, more than "
                f"{target(rule.red_tpr_at_1_percent)} of the patients named at 1\u00a0% false alarms; or "
                f"significantly "
                "more copies of members than of held-outs.",
            ),
            (
                "AMBER",
                f"An attack above chance (corrected p below {rule.significance:g}), or too few patients to "
                f"exclude what "
                "GREEN excludes.",
            ),
            (
                "GREEN",
                f"With 95\u00a0% confidence and for every attack: patient-level AUC at most "
                f"{rule.green_auc:.2f}, at most "
                f"{target(rule.green_tpr_at_1_percent)} of the patients named at 1\u00a0% false alarms, and no "
                f"excess of "
                "copies.",
            ),
        )
    )
    blocks: tuple[Block, ...] = (
        Table(
            caption="Tests that decided the verdict, worst first",
            columns=("Test", "Demands", "Found", "Cut-off", "Meaning"),
            rows=rows,
            widths=(20, 11, 24, 18, 27),
        ),
        Details("The rule that was applied, as the site set it", (cut_offs,)),
    )
    return Section(name="reasons", title="Why this verdict", blocks=blocks)


def _subject(evidence: Evidence) -> Section:
    where = {
        "central": "One machine held the images of all sites named here.",
        "federated": "Patients stayed at their sites, which scored them and sent counts; the server added them up.",
    }
    blocks: list[Block] = [
        Paragraph(
            "Members are patients whom the model was trained on; held-outs are patients of the same sites, "
            "prepared in "
            "the same way, whom it never saw. An attack gets an image and guesses which kind it is. "
            + where[evidence.scope]
        ),
        Table(
            caption="Patients",
            columns=("Site", "Members", "Held out", "Images"),
            rows=tuple((c.site, str(c.members), str(c.held_out), str(c.images)) for c in evidence.cohorts),
            widths=(40, 20, 20, 20),
        ),
    ]
    if evidence.suppressed:
        blocks.append(
            Paragraph(
                f"In all counts of the report half together, {evidence.suppressed} entries were moved to a "
                "neighbouring cell or left out, because too few patients stood in their own for a site to let the "
                "count go. That blurs the figures."
            )
        )
    return Section(name="subject", title="What was audited", blocks=tuple(blocks))


def _threats(evidence: Evidence) -> Section:
    blocks: list[Block] = [
        Paragraph(
            "Whoever is given more can do all that comes before it. The strongest attack at each step is the "
            "one that "
            "did best on the patients who were set aside for choosing."
        )
    ]
    copies = evidence.copies
    for access in LADDER:
        title, text = RELEASES[access]
        attack = strongest(evidence.attacks, access)
        said = "No attack of this kind was run." if attack is None else f"Strongest: {reach(attack)}"
        if access == "samples":
            screens = [f"{c.copies} of {c.samples} samples are candidates by {c.method}" for c in copies]
            said = f"Copy screen: {'; '.join(screens)}." if screens else "No samples were screened."
        elif access == "updates" and not any(a.access == "updates" for a in evidence.attacks):
            said = "No attack on updates was run; at least what holds for the weights holds here."
        blocks += [Heading(title), Paragraph(f"{text} {said}")]
        if own := [a.title for a in ranked(evidence) if a.access == access]:
            blocks.append(Paragraph(f"Attacks that need this access and no more: {', '.join(own)}."))
    if evidence.inversions:
        redrawn = "; ".join(f"from {found.seen}: {found.rdlv:.2f}" for found in evidence.inversions)
        blocks.append(Paragraph(f"Redrawing an image, relative data leakage value {redrawn} (0 or less is nothing)."))
    return Section(name="threats", title="What is exposed by what is released", blocks=tuple(blocks))


def _attacks(evidence: Evidence, rule: DecisionRule) -> Section:
    blocks: list[Block] = [
        Paragraph(
            "Timesteps, signs and thresholds were chosen on one half of the patients; every figure is of the "
            "other half. "
            "An attack is repeated with several seeds, which also split the patients anew; the seed with the "
            "median AUC "
            "is reported."
        )
    ]
    blocks += [chart for chart in (roc_chart(evidence), auc_chart(evidence, cut_off=rule.green_auc)) if chart]
    blocks.append(
        Table(
            caption="Attacks at patient level, strongest on tuning data first; intervals are 95\u00a0%",
            columns=(
                "Attack",
                "With",
                "AUC, patients",
                "AUC, images",
                "TPR at 10\u00a0% FPR",
                "TPR at 1\u00a0% FPR",
                "Corrected p",
            ),
            rows=tuple(
                (
                    attack.title,
                    attack.access,
                    area(attack.outcome.patient_auc),
                    area(attack.outcome.slice_auc),
                    true_positives(attack.outcome.points, 0.1),
                    true_positives(attack.outcome.points, 0.01),
                    p_value(attack.adjusted_p),
                )
                for attack in ranked(evidence)
            ),
            widths=(17, 11, 15, 15, 15, 15, 12),
        )
    )
    blocks.append(Details("How each attack works, and all seeds", tuple(_each(ranked(evidence)))))
    return Section(name="attacks", title="Attacks", blocks=tuple(blocks))


def _each(attacks: Iterable[AttackOutcome]) -> Iterable[Block]:
    for attack in attacks:
        yield Heading(attack.title)
        yield Facts(
            (
                ("Statistic", attack.statistic),
                ("Source", attack.paper),
                ("The attacker holds", ACCESS[attack.access]),
                ("U-Net evaluations per image", count(attack.evaluations_per_image)),
            )
        )
        yield Table(
            caption=f"{attack.title}: every seed",
            columns=("Seed", "Chosen", "AUC, tuning half", "AUC, patients", "AUC, images", "p"),
            rows=tuple(
                (
                    f"{seed.seed}{' (reported)' if index == attack.reported else ''}",
                    f"{seed.setting}, {'high' if seed.sign == 1 else 'low'} means member, trim {seed.trim:g}",
                    f"{seed.tuning_auc:.3f}",
                    area(seed.patient_auc),
                    area(seed.slice_auc),
                    p_value(seed.p_value),
                )
                for index, seed in enumerate(attack.seeds)
            ),
            widths=(13, 24, 12, 21, 21, 9),
        )


def _worst(evidence: Evidence) -> Section:
    attack = evidence.attacks[evidence.strongest]
    worst = attack.worst
    facts = Facts(
        (
            (
                "Members who score above every held-out patient",
                f"{worst.above_all_held_out} of {worst.members}",
            ),
            (
                "Members flagged under every seed, at 10\u00a0% false alarms",
                f"{worst.flagged_in_every_seed}; chance would flag about {count(worst.flagged_expected)}",
            ),
            (
                "Held-outs among whom the most exposed 5\u00a0% of members are hidden",
                f"{percent(worst.held_out_above_95th)} of the held-outs score at least as high",
            ),
        )
    )
    text = (
        "An average can hide a few patients who are badly exposed. These figures are of the strongest attack, "
        f"{attack.title}."
    )
    return Section(name="worst", title="The most exposed patients", blocks=(Paragraph(text), facts))


def _checks(evidence: Evidence) -> Section:
    blind = evidence.blind
    rows = []
    if blind is None:
        rows.append(("Blind test", "must be at chance", "not run", "failed"))
    else:
        found = f"AUC {area(blind.patient_auc)}, {p_said(blind.p_value)}"
        rows.append(("Blind test", "must be at chance", found, "failed" if blind.confounded else "passed"))
    for control in evidence.controls:
        wanted = "must be caught" if control.kind == "positive" else "must not be caught"
        found = f"AUC {area(control.patient_auc)}, {p_said(control.p_value)}"
        rows.append((f"Control: {control.name}", wanted, found, "passed" if control.passed else "failed"))
    explained = [
        (f"Control: {c.name}", f"{c.explanation} {c.members} against {c.non_members}.") for c in evidence.controls
    ]
    if blind is not None:
        explained.insert(0, ("Blind test", f"A classifier that never sees the model. {blind.note}."))
    return Section(
        name="checks",
        title="Checks of the audit itself",
        blocks=(
            Table(
                caption="An audit that fails one of these says nothing about the model",
                columns=("Check", "Demand", "Found", "Result"),
                rows=tuple(rows),
                widths=(24, 20, 42, 14),
            ),
            Facts(tuple(explained)),
        ),
    )


def _copies(evidence: Evidence, gallery: Gallery | None) -> Section:
    blocks: list[Block] = []
    if not evidence.copies:
        blocks.append(Paragraph("No samples were screened: nothing is known of copies."))
    else:
        blocks.append(
            Paragraph(
                "A sample is a candidate copy if it is closer to a member than 95\u00a0% of the held-out "
                "patients' own "
                "images are, so about one in twenty innocent samples is one. What decides is the comparison with "
                "held-outs: as many patients, who cannot have been copied."
            )
        )
        blocks.append(
            Table(
                caption="Samples that are too close to a patient",
                columns=("Measure", "Candidates", "Members", "Held-outs", "p of the excess"),
                rows=tuple(
                    (
                        copies.method,
                        f"{copies.copies} of {copies.samples}",
                        count(copies.copies_matched),
                        count(copies.control_matched),
                        p_value(copies.p_value),
                    )
                    for copies in evidence.copies
                ),
                widths=(24, 22, 18, 18, 18),
            )
        )
        withheld = sorted({sample for copies in evidence.copies for sample in copies.withhold})
        listed = ", ".join(map(str, withheld)) or "none"
        blocks.append(Facts((("Samples to be withheld from a release, by index", listed),)))
    if gallery is not None:
        blocks += [Alert("Patient images", WARNING), Pictures(gallery)]
    return Section(name="copies", title="Copies among the samples", blocks=tuple(blocks))


def _privacy(privacy: ClaimedPrivacy | None) -> Section:
    if privacy is None:
        text = (
            "The model was trained without differential privacy: no bound holds for any patient, and nothing but "
            "measurements speaks for it."
        )
        return Section(name="privacy", title="Differential privacy", blocks=(Paragraph(text),))
    blocks: list[Block] = [
        Facts(
            (
                ("Claimed", _claim(privacy)),
                ("If so, no attack on one patient has an AUC above", f"{privacy.ceiling_auc:.3f}"),
                (
                    "nor names a patient at 1\u00a0% false alarms with more than",
                    percent(privacy.ceiling_tpr_at_1_percent),
                ),
                ("Plan, SHA-256", privacy.plan_sha256),
                ("Canaries, committed before training, SHA-256", privacy.commitment or "none were used"),
            )
        )
    ]
    if privacy.lower_bounds:
        blocks.append(epsilon_chart(privacy))
        blocks.append(
            Table(
                caption="Lower bounds on ε from canaries: a claim below one of them would be refuted",
                columns=("Method", "ε is at least", "δ", "Confidence", "In, out", "How"),
                rows=tuple(
                    (
                        bound.method,
                        f"{bound.epsilon:.3f}",
                        f"{bound.delta:g}",
                        percent(bound.confidence),
                        f"{bound.members}, {bound.non_members}",
                        bound.detail,
                    )
                    for bound in privacy.lower_bounds
                ),
                widths=(22, 13, 10, 13, 12, 30),
            )
        )
    else:
        blocks.append(Paragraph("No canaries were trained on: the claim was not tested."))
    return Section(name="privacy", title="Differential privacy: claim, bounds, ceiling", blocks=tuple(blocks))


def _updates(evidence: Evidence) -> Section:
    if not evidence.inversions:
        return Section(name="updates", title="Redrawing a patient from an update", blocks=())
    return Section(
        name="updates",
        title="Redrawing a patient from an update",
        blocks=(
            Paragraph(
                "The strongest attacker, who knows noise and timestep, redraws one training image. The relative data "
                "leakage value says how much more like the patient the picture is than a mean image; 0 or less "
                "is nothing."
            ),
            Table(
                caption="From one site's update, and from a sum, as secure aggregation leaves it",
                columns=(
                    "What the server sees",
                    "Relative data leakage value",
                    "Structural similarity",
                    "Update matched",
                ),
                rows=tuple(
                    (found.seen, f"{found.rdlv:.2f}", f"{found.ssim:.2f}", f"{found.cosine:.3f}")
                    for found in evidence.inversions
                ),
                widths=(40, 22, 20, 18),
            ),
        ),
    )


def _sites(evidence: Evidence) -> Section:
    attack = evidence.attacks[evidence.strongest]
    rows = tuple(
        (
            row.site,
            str(row.members),
            str(row.held_out),
            row.note if row.patient_auc is None else area(row.patient_auc),
        )
        for row in evidence.sites
    )
    if not rows:
        why = {"central": "None were computed.", "federated": "Counts reached the server as sums only."}
        text = f"{why[evidence.scope]} No site's own figures are known."
        return Section(name="sites", title="Site by site", blocks=(Paragraph(text),))
    table = Table(
        caption=f"{attack.title} at each site, report half",
        columns=("Site", "Members", "Held out", "Patient-level AUC"),
        rows=rows,
        widths=(30, 15, 15, 40),
    )
    return Section(name="sites", title="Site by site", blocks=(table,))


def _rerun(evidence: Evidence) -> Section:
    model = evidence.model
    hashes = [
        ("Model, SHA-256", model.model_sha256),
        ("Configuration, SHA-256", model.config_sha256),
        ("Noise schedule, SHA-256", model.schedule_sha256),
        ("Rounds in the model", str(model.rounds_done)),
        *((f"Manifest of {c.site}, SHA-256", c.manifest_sha256 or "not known: sums only") for c in evidence.cohorts),
        ("Software", ", ".join(f"{name} {version}" for name, version in evidence.software)),
    ]
    cost = Table(
        caption="What it took",
        columns=("Part", "U-Net evaluations per image", "Seconds"),
        rows=tuple((c.part, count(c.evaluations_per_image), f"{c.seconds:.0f}") for c in evidence.costs),
        widths=(50, 30, 20),
    )
    return Section(
        name="rerun",
        title="To check it: hashes, cost, command",
        blocks=(Facts(tuple(hashes)), cost, Paragraph("To run it again:"), Command(evidence.command)),
    )
