"""The report of an audit, written once as plain blocks for every form in which it is read."""

from __future__ import annotations

from collections.abc import Iterator

from privacy.audit.decision import ACCESS, NO_LEAK
from privacy.audit.evidence import Access, AttackOutcome, ClaimedPrivacy, Evidence, SeedOutcome
from privacy.audit.report import annex, wording
from privacy.audit.report.blocks import (
    Alert,
    Block,
    Bullets,
    Command,
    Details,
    Facts,
    Paragraph,
    Pictures,
    Report,
    Section,
    Table,
)
from privacy.audit.report.charts import auc_chart, epsilon_chart, ranked, roc_chart
from privacy.audit.report.document import Audit
from privacy.audit.report.gallery import WARNING, Gallery
from privacy.audit.report.wording import area, count, p_value, percent, true_positives

_RELEASE: dict[Access, tuple[str, str]] = {
    "samples": ("Samples only", "images drawn from the model; the model stays where it is"),
    "api": ("Queries", "an interface through which the denoiser can be asked; and its samples"),
    "weights": ("The weights", "the model's file: samples, queries and gradients of whatever is wished"),
    "updates": ("The updates of every round", "what the server sees in training: all intermediate models, and more"),
}


def report_of(audit: Audit, *, gallery: Gallery | None = None) -> Report:
    """The whole report.

    Args:
        audit: as in audit.json.
        gallery: images of patients beside the samples that resemble them: for the site's own copy alone.
    """
    evidence, decision = audit.evidence, audit.decision
    scope = "one machine saw all images" if evidence.scope == "central" else "sites kept their images and sent counts"
    sites = ", ".join(cohort.site for cohort in evidence.cohorts)
    sections = (
        _reasons(audit),
        _audited(evidence),
        _threat_model(audit),
        _curves(audit),
        _attacks(evidence),
        _worst(evidence),
        _controls(evidence),
        _blind(evidence),
        _copies(evidence, gallery),
        _privacy(evidence),
        _inversion(evidence),
        _sites(evidence),
        _cost(evidence),
        annex.limits(evidence, audit.rule),
        annex.assessment(evidence),
        _provenance(evidence),
        annex.glossary(),
    )
    return Report(
        title=f"Privacy audit of {evidence.model.experiment}",
        subtitle=f"{evidence.created}; patients of {sites}; {evidence.scope}: {scope}",
        created=evidence.created,
        verdict=decision.verdict,
        headline=wording.HEADLINE[decision.verdict],
        sentence=decision.sentence,
        meaning=wording.MEANING[decision.verdict],
        summary=Facts(tuple(_summary(evidence))),
        warning="" if gallery is None else WARNING,
        sections=sections,
    )


def _summary(evidence: Evidence) -> Iterator[tuple[str, str]]:
    if evidence.attacks:
        yield "Strongest attack", wording.reach(evidence.attacks[evidence.strongest])
    else:
        yield "Strongest attack", "No attack was run."
    patients = f"{evidence.report_members} members, {evidence.report_held_out} held-outs"
    yield "Patients behind the figures", f"{patients}, none of whom helped to choose an attack's settings."
    over = [f"{copies.copies} of {copies.samples} by {copies.method}" for copies in evidence.copies]
    yield "Samples too close to a patient", "; ".join(over) or "No samples were screened."
    claim = evidence.privacy
    if claim is None:
        yield "Claimed privacy", "None: no theorem bounds what a stronger attack could find."
    else:
        largest = max((bound.epsilon for bound in claim.lower_bounds), default=None)
        found = "nothing was measured against it" if largest is None else f"canaries show at least {largest:.2f}"
        yield "Claimed privacy", f"ε = {claim.epsilon:.2f} at δ = {claim.delta:.3g} for each patient; {found}."


def _reasons(audit: Audit) -> Section:
    rule = audit.rule
    reasons = tuple((r.test, r.verdict, r.found, r.cut_off, r.meaning) for r in audit.decision.reasons)
    found = "Tests that were passed" if audit.decision.verdict == "GREEN" else "Tests that were not passed, worst first"
    cut_offs = (
        ("INVALID", "blind test, controls", "any that was not run or gave the wrong answer", "Nothing else counts."),
        (
            "RED",
            "TPR at 1\u00a0% FPR",
            f"lower end of an interval above {wording.target(rule.red_tpr_at_1_percent)}",
            "So many patients could be named with one false alarm in a hundred.",
        ),
        ("RED", "lower bound on ε", "above the claimed ε", "The claimed differential privacy does not hold."),
        (
            "RED",
            "copies",
            f"p below {rule.significance:g}, shared between the measures of likeness",
            "Samples repeat members more often than they resemble patients the model never saw.",
        ),
        (
            "AMBER",
            "any attack",
            f"corrected p below {rule.significance:g}",
            "An attack does better than chance, though perhaps by little.",
        ),
        (
            "AMBER",
            "power",
            f"upper end of an AUC above {rule.green_auc:g}, or of a TPR at 1\u00a0% FPR above "
            f"{wording.target(rule.green_tpr_at_1_percent)}, or one of them not measurable; or no samples screened",
            "Too little was measured to exclude a leak of that size.",
        ),
        ("GREEN", "all of them", "none of the above", f"{NO_LEAK[0].upper()}{NO_LEAK[1:]}."),
    )
    return Section(
        name="reasons",
        title="Why this verdict",
        blocks=(
            Table(found, ("Test", "Asks for", "Found", "Cut-off", "In words"), reasons, (22, 11, 24, 20, 33)),
            Details(
                "The rule, with every cut-off",
                (
                    Paragraph(
                        "The verdict follows from the figures by this rule and by nothing else. The site sets the "
                        "cut-offs in its policy; whoever reads audit.json computes the verdict again."
                    ),
                    Table(
                        "Cut-offs of this audit", ("Verdict", "Looks at", "If", "Because"), cut_offs, (11, 20, 42, 37)
                    ),
                ),
            ),
        ),
    )


def _audited(evidence: Evidence) -> Section:
    model = evidence.model
    cohorts = tuple((c.site, str(c.members), str(c.held_out), str(c.images)) for c in evidence.cohorts)
    halves = (
        ("Tuning half", str(evidence.tuning_members), str(evidence.tuning_held_out), "chooses settings and thresholds"),
        ("Report half", str(evidence.report_members), str(evidence.report_held_out), "gives every figure shown"),
    )
    blocks: list[Block] = [
        Facts(
            (
                ("Model", f"{model.experiment}, after {model.rounds_done} rounds of training"),
                ("Members", "patients whom the model was trained on"),
                ("Held-outs", "patients of the same sites whom it never saw; the attacks must tell the two apart"),
            )
        ),
        Table("Patients", ("Site", "Members", "Held-outs", "Images"), cohorts, (40, 20, 20, 20)),
        Table("Two halves, split by patient", ("Half", "Members", "Held-outs", "Use"), halves, (24, 18, 18, 40)),
    ]
    if evidence.scope == "federated":
        blocks.append(
            Paragraph(
                "Images and scores stayed at the sites, which sent counts. Cells that stood for fewer patients than a "
                f"site's minimum were merged with their neighbours before anything left: {evidence.suppressed} cells. "
                "Merging makes curves coarser."
            )
        )
    return Section(name="audited", title="What was audited", blocks=tuple(blocks))


def _threat_model(audit: Audit) -> Section:
    evidence = audit.evidence
    rows = []
    for access in wording.LADDER:
        able = [a for a in evidence.attacks if wording.LADDER.index(a.access) <= wording.LADDER.index(access)]
        title, given = _RELEASE[access]
        others = ["the copy screen"] if evidence.copies else []
        others += ["update inversion"] if access == "updates" and evidence.inversions else []
        names = [attack.title for attack in able] + others
        rows.append((title, given, "; ".join(names) or "none was run", _in_words(evidence, access)))
    return Section(
        name="threat-model",
        title="Who could attack, and how far these attacks get",
        blocks=(
            *_caution(audit),
            Paragraph(
                "What an attacker can do depends on what is released. Each row can also do everything that stands in the "
                "rows above it. The strongest attack is the one that did best on the tuning half."
            ),
            Table(
                "By what is released",
                ("Released", "The attacker holds", "Attacks that apply", "Strongest result"),
                tuple(rows),
                (14, 22, 30, 44),
            ),
        ),
    )


def _in_words(evidence: Evidence, access: Access) -> str:
    attack = wording.strongest(evidence.attacks, access)
    said = [f"No attack was run that works with {ACCESS[access]} alone." if attack is None else wording.reach(attack)]
    if access == "samples":
        said += [
            f"{copies.copies} of {copies.samples} samples are too close to a member." for copies in evidence.copies
        ]
    if access == "updates":
        said += [
            f"From {inversion.seen}, redrawn images have a data leakage value of {inversion.rdlv:.2f}."
            for inversion in evidence.inversions
        ]
    return " ".join(said)


def _caution(audit: Audit) -> Iterator[Block]:
    if audit.decision.verdict == "INVALID":
        yield Alert("Not findings", "This audit is invalid: the figures of this section say nothing about the model.")


def _curves(audit: Audit) -> Section:
    evidence = audit.evidence
    blocks: list[Block] = [*_caution(audit)]
    roc, auc = roc_chart(evidence), auc_chart(evidence, cut_off=audit.rule.green_auc)
    if roc is None:
        blocks.append(Paragraph("No attack has a curve."))
    else:
        blocks.append(
            Paragraph(
                "Privacy is lost at the left edge: there few others are accused wrongly, and an accusation is worth "
                "something. A curve on the dotted diagonal is guessing. Bands hold at each rate by itself, not for the "
                "whole curve at once."
            )
        )
        if evidence.privacy is not None:
            blocks.append(
                Paragraph(
                    "If the claimed (ε, δ) holds, no attack on one patient can lie above the ceiling: TPR ≤ e^ε FPR + δ "
                    "and 1 - FPR ≤ e^ε (1 - TPR) + δ."
                )
            )
        blocks.append(roc)
    if auc is not None:
        blocks.append(auc)
    return Section(name="roc", title="How well the attacks do", blocks=tuple(blocks))


def _attacks(evidence: Evidence) -> Section:
    if not evidence.attacks:
        return Section(name="attacks", title="The attacks", blocks=(Paragraph("No attack was run."),))
    what, found = [], []
    for attack in ranked(evidence):
        outcome = attack.outcome
        paper = f"arXiv:{attack.paper}" if attack.paper else "none"
        evaluations = f"{attack.evaluations_per_image:g}"
        what.append((attack.title, ACCESS[attack.access], attack.statistic, paper, _setting(outcome), evaluations))
        found.append(
            (
                attack.title,
                area(outcome.patient_auc),
                area(outcome.slice_auc),
                true_positives(outcome.points, 0.1),
                true_positives(outcome.points, 0.01),
                p_value(attack.adjusted_p),
            )
        )
    return Section(
        name="attacks",
        title="The attacks",
        blocks=(
            Table(
                "What each attack found, with 95\u00a0% intervals",
                (
                    "Attack",
                    "AUC, patients",
                    "AUC, slices",
                    "TPR at 10\u00a0% FPR",
                    "TPR at 1\u00a0% FPR",
                    f"p, corrected for {len(evidence.attacks)} attacks",
                ),
                tuple(found),
                (28, 20, 20, 22, 24, 16),
            ),
            Table(
                "What each attack computes",
                ("Attack", "The attacker holds", "Statistic", "Paper", "Setting chosen", "U-Net evaluations an image"),
                tuple(what),
                (24, 18, 34, 18, 20, 16),
            ),
            Paragraph(
                "Every attack was run under several seeds, each with its own split and noise. The figures above are those "
                "of the seed whose AUC is the median; all of them stand here."
            ),
            *(_seeds(attack) for attack in ranked(evidence)),
        ),
    )


def _seeds(attack: AttackOutcome) -> Details:
    rows = tuple(
        (
            f"{outcome.seed}{' (shown above)' if index == attack.reported else ''}",
            _setting(outcome),
            f"{outcome.tuning_auc:.3f}",
            area(outcome.patient_auc),
            area(outcome.slice_auc),
            p_value(outcome.p_value),
            true_positives(outcome.points, 0.1),
            true_positives(outcome.points, 0.01),
            true_positives(outcome.slice_points, 0.01),
        )
        for index, outcome in enumerate(attack.seeds)
    )
    columns = (
        "Seed",
        "Setting chosen",
        "AUC, tuning half",
        "AUC, patients",
        "AUC, slices",
        "p",
        "TPR at 10\u00a0% FPR",
        "TPR at 1\u00a0% FPR",
        "TPR at 1\u00a0% FPR, slices",
    )
    return Details(
        f"{attack.title}: all {len(rows)} seeds",
        (
            Table(f"{attack.title} under each seed", columns, rows, (10, 16, 11, 15, 15, 9, 16, 17, 17)),
            Paragraph(
                f"Over the seeds together p = {p_value(attack.p_value)} (twice the median), corrected "
                f"{p_value(attack.adjusted_p)}. The AUC of the tuning half is optimistic: the choices were made on it. "
                "Intervals of true positive rates over slices take slices for independent, which they are not."
            ),
        ),
    )


def _setting(outcome: SeedOutcome) -> str:
    direction = "high values" if outcome.sign > 0 else "low values"
    trimmed = f", {percent(outcome.trim)} of images dropped at each end" if outcome.trim else ""
    return f"{outcome.setting}; {direction} mean members{trimmed}"


def _worst(evidence: Evidence) -> Section:
    rows = tuple(
        (
            attack.title,
            str(attack.worst.members),
            str(attack.worst.above_all_held_out),
            f"{attack.worst.flagged_in_every_seed} (by chance {count(attack.worst.flagged_expected)})",
            percent(attack.worst.held_out_above_95th),
        )
        for attack in ranked(evidence)
    )
    columns = (
        "Attack",
        "Members in the report half",
        "Score above every held-out",
        "Flagged under every seed",
        "Held-outs who hide the top 5\u00a0% of members",
    )
    text = (
        "An average can be harmless while single patients are not. A member who scores above every held-out is one whom "
        "this attack singles out. Flagged means above the threshold for 10\u00a0% false alarms. In the last column, the "
        "most exposed 5\u00a0% of members are hidden among that share of held-outs; guessing would have 5\u00a0%. The "
        "report names no patient."
    )
    table = (Table("The most exposed patients", columns, rows, (30, 18, 20, 22, 24)),) if rows else ()
    return Section(name="worst-patients", title="The most exposed patients", blocks=(Paragraph(text), *table))


def _controls(evidence: Evidence) -> Section:
    rows = tuple(
        (
            control.name,
            "must be caught" if control.kind == "positive" else "must not be caught",
            "right" if control.passed else "WRONG",
            area(control.patient_auc),
            f"{p_value(control.p_value)} (caught below {control.level:g})",
            f"{control.members} and {control.non_members}",
            control.explanation,
        )
        for control in evidence.controls
    )
    columns = ("Control", "Expected", "Answer", "AUC", "p", "Members and others", "What was done")
    text = (
        "The same attacks on models of which the answer is known. If they miss a model that was overfitted on purpose, "
        "their silence means nothing; if they accuse a model that cannot remember anyone, neither does their alarm."
    )
    table: Block = (
        Table("Controls", columns, rows, (15, 15, 12, 20, 18, 14, 30)) if rows else Alert("None", "No control.")
    )
    return Section(name="controls", title="Do the attacks work here? Controls", blocks=(Paragraph(text), table))


def _blind(evidence: Evidence) -> Section:
    text = (
        "A classifier that never sees the model tries to tell members from held-outs by their images. If it can, so can an "
        "attack, and its success would say nothing about the model."
    )
    blind = evidence.blind
    if blind is None:
        result: Block = Alert(
            "Not run", "The blind test was left out, so that no figure of this report can be interpreted."
        )
    else:
        answer = "CONFOUNDED: better than chance" if blind.confounded else "at chance, as it must be"
        rows = (
            ("Answer", answer),
            ("AUC, patients", area(blind.patient_auc)),
            ("p, by permutation of patients", p_value(blind.p_value)),
            ("How", blind.note),
        )
        result = Facts(rows)
    return Section(name="blind", title="Are members and held-outs alike? Blind test", blocks=(Paragraph(text), result))


def _copies(evidence: Evidence, gallery: Gallery | None) -> Section:
    blocks: list[Block] = [
        Paragraph(
            "Samples are held against members and, on the same terms, against held-outs whom the model cannot have copied: "
            "patients resemble each other. Only more hits among members than among held-outs are a sign of copying. Each "
            "single sample over the threshold should be withheld all the same."
        )
    ]
    if not evidence.copies:
        blocks.append(Alert("Not screened", "No samples were drawn, so that nobody has looked for copies."))
    else:
        rows = tuple(
            (
                copies.method,
                str(copies.samples),
                str(copies.copies),
                f"{count(copies.copies_matched)} against {count(copies.control_matched)}",
                p_value(copies.p_value),
                ", ".join(map(str, copies.withhold)) or "none",
            )
            for copies in evidence.copies
        )
        columns = ("Likeness by", "Samples", "Too close to a member", "On equal terms: members against held-outs", "p")
        widths = (16, 12, 16, 24, 12, 34)
        blocks.append(Table("Copy screen", (*columns, "Samples to withhold"), rows, widths))
    if gallery is not None:
        blocks += [Alert("Images of patients", WARNING), Pictures(gallery)]
    return Section(name="copies", title="Do samples repeat patients? Copy screen", blocks=tuple(blocks))


def _privacy(evidence: Evidence) -> Section:
    claim = evidence.privacy
    if claim is None:
        text = (
            "The model was trained without differential privacy. There is no ceiling that every attack must keep to: what "
            "these attacks did not find, another might."
        )
        return Section(name="privacy", title="Claimed ε and measured ε", blocks=(Paragraph(text),))
    blocks: list[Block] = [
        Paragraph(
            f"The model's plan claims ε = {claim.epsilon:.3g} at δ = {claim.delta:.3g} for a patient of one site. Canaries, "
            "whose inclusion a coin decided before training, can refute such a claim; they cannot confirm it. A lower bound "
            "far below the claim is what both a sound claim and a weak attack look like."
        ),
        epsilon_chart(claim),
    ]
    if claim.lower_bounds:
        rows = tuple(
            (
                bound.method,
                f"ε ≥ {bound.epsilon:.2f}",
                "claim refuted" if bound.epsilon > claim.epsilon else "claim stands",
                f"δ = {bound.delta:.3g}, {percent(bound.confidence)}",
                f"{bound.members} in, {bound.non_members} out",
                bound.detail,
            )
            for bound in claim.lower_bounds
        )
        columns = ("Method", "Lower bound", "Against the claim", "At δ, confidence", "Canaries", "Detail")
        blocks.append(Table("Lower bounds on ε from canaries", columns, rows, (28, 14, 16, 20, 16, 32)))
        if len(claim.lower_bounds) > 1:
            blocks.append(Paragraph("Each bound holds at its confidence by itself; together they hold at less."))
    blocks.append(_ceiling(evidence, claim))
    commitment = claim.commitment or "none: there were no canaries"
    blocks.append(Facts((("Plan, SHA-256", claim.plan_sha256), ("Commitment to the canaries' coins", commitment))))
    return Section(name="privacy", title="Claimed ε and measured ε", blocks=tuple(blocks))


def _ceiling(evidence: Evidence, claim: ClaimedPrivacy) -> Table:
    attack = evidence.attacks[evidence.strongest] if evidence.attacks else None
    outcome = None if attack is None else attack.outcome
    rows = (
        (
            "AUC, patients",
            f"at most {claim.ceiling_auc:.3f}",
            "no attack was run" if outcome is None else area(outcome.patient_auc),
        ),
        (
            "TPR at 1\u00a0% FPR",
            f"at most {percent(claim.ceiling_tpr_at_1_percent)}",
            "no attack was run" if outcome is None else true_positives(outcome.points, 0.01),
        ),
    )
    measured = "Strongest attack" if attack is None else f"Strongest attack: {attack.title}"
    caption = "What the claim allows an attack on one patient, read from the plan's whole privacy curve"
    return Table(caption, ("Quantity", "Ceiling", measured), rows, (30, 30, 50))


def _inversion(evidence: Evidence) -> Section:
    text = (
        "A curious server tries to redraw a training batch from what a site sends. The relative data leakage value (RDLV, "
        "arXiv:2202.06924) is 0 or less if the redrawn image is no closer to the patient than what could be guessed "
        "beforehand."
    )
    rows = tuple(
        (i.seen, f"{i.rdlv:.3f}", f"{i.ssim:.3f}", "no more than a guess" if i.rdlv <= 0 else "more than a guess")
        for i in evidence.inversions
    )
    result: Block = Paragraph("No update was inverted: the audit says nothing about what a server could redraw.")
    if rows:
        result = Table("Update inversion", ("The server sees", "RDLV", "SSIM", "In words"), rows, (40, 20, 20, 40))
    title = "What a server could redraw: update inversion"
    return Section(name="inversion", title=title, blocks=(Paragraph(text), result))


def _sites(evidence: Evidence) -> Section:
    title = "Site by site"
    if not evidence.sites:
        text = "No figures by site: the sites' policies keep them, or there is one site."
        return Section(name="sites", title=title, blocks=(Paragraph(text),))
    rows = tuple(
        (
            site.site,
            str(site.members),
            str(site.held_out),
            "not shown" if site.patient_auc is None else area(site.patient_auc),
            site.note or "none",
        )
        for site in evidence.sites
    )
    columns = ("Site", "Members", "Held-outs", "AUC, patients", "Note")
    table = Table("The strongest attack at each site", columns, rows, (28, 14, 14, 28, 36))
    return Section(name="sites", title=title, blocks=(table,))


def _cost(evidence: Evidence) -> Section:
    rows = tuple((c.part, f"{c.evaluations_per_image:g}", f"{c.seconds:,.1f}") for c in evidence.costs)
    columns = ("Part", "U-Net evaluations an image", "Seconds")
    text = "Evaluations are shared between the attacks where they can be: an attacker who runs one attack pays less."
    table: Block = Table("Cost of the audit", columns, rows, (50, 30, 20)) if rows else Paragraph("Not recorded.")
    return Section(name="cost", title="What the audit cost", blocks=(Paragraph(text), table))


def _provenance(evidence: Evidence) -> Section:
    model = evidence.model
    hashes = (
        ("Model", model.model_sha256),
        ("Configuration", model.config_sha256),
        ("Noise schedule", model.schedule_sha256),
        *((f"Cohort manifest of {cohort.site}", cohort.manifest_sha256) for cohort in evidence.cohorts),
    )
    versions = tuple(f"{name} {version}" for name, version in evidence.software)
    return Section(
        name="provenance",
        title="To check and to repeat",
        blocks=(
            Table("SHA-256", ("Of", "Hash"), hashes, (34, 86)),
            Paragraph("To run the audit again:"),
            Command(evidence.command),
            Paragraph("Software:"),
            Bullets(versions or ("not recorded",)),
        ),
    )
