"""What the report says must follow from the evidence, also where a part of it is missing."""

from __future__ import annotations

from dataclasses import replace

from evidence_example import attack, claimed, clean, control, interval

from privacy.audit.decision import DecisionRule
from privacy.audit.evidence import BlindOutcome, Evidence, InversionOutcome
from privacy.audit.report.blocks import Block, Details, Facts, Paragraph, Table
from privacy.audit.report.content import report_of
from privacy.audit.report.document import audit_of


def said(evidence: Evidence, section: str) -> str:
    (found,) = (s for s in report_of(audit_of(evidence, DecisionRule()), None).sections if s.name == section)
    return " ".join(text(block) for block in found.blocks)


def text(block: Block) -> str:
    if isinstance(block, Paragraph):
        return block.text
    if isinstance(block, Facts | Table):
        return " ".join(" ".join(row) for row in block.rows)
    return " ".join(text(inner) for inner in block.blocks) if isinstance(block, Details) else ""


def test_no_canaries_show_nothing() -> None:
    untested = replace(claimed(2.5), lower_bounds=(), commitment=None)
    assert "canaries show" not in said(clean(privacy=untested), "annex")
    assert "the claim was not tested with canaries" in said(clean(privacy=untested), "annex")
    assert "canaries show at least 2.50" in said(clean(privacy=claimed(2.5)), "annex")


def test_only_a_federated_audit_has_a_server() -> None:
    assert "server" not in said(clean(scope="central", sites=()), "sites")
    assert "Counts reached the server as sums only" in said(clean(scope="federated", sites=()), "sites")


def test_a_small_p_is_less_and_not_equal() -> None:
    blind = BlindOutcome(patient_auc=interval(0.9, 0.8, 1.0), p_value=1e-6, confounded=True, note="n")
    caught = replace(control("overfitted", True), p_value=1e-6)
    shown = said(clean(blind=blind, controls=(caught, control("untrained", False))), "checks")
    assert "= <" not in shown
    assert shown.count("p <\u00a00.001") == 2
    assert "p = 0.500" in shown


def test_every_attack_stands_with_the_access_that_it_needs() -> None:
    attacks = tuple(
        replace(attack(), name=access, title=f"by {access}", access=access) for access in ("api", "weights", "updates")
    )
    inversions = (InversionOutcome(seen="one site's update", rdlv=0.81, ssim=0.9, cosine=0.99),)
    threats = said(clean(attacks=attacks, inversions=inversions), "threats")
    for access in ("api", "weights", "updates"):
        assert f"Attacks that need this access and no more: by {access}." in threats
    assert "from one site's update: 0.81" in threats
    assert "Redrawing" not in said(clean(attacks=attacks), "threats")
    shown = said(clean(attacks=attacks), "attacks")
    assert all(f"by {access} {access} " in shown for access in ("api", "weights", "updates"))
