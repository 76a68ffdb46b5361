"""Privacy policies of sites in tests, as they stand in a site file."""

from collections.abc import Iterable

ALL_STATISTICS = (
    "weight",
    "train_loss",
    "held_out_loss",
    "seconds",
    "effnet_kid",
    "effnet_kid_baseline",
    "effnet_kid_untrained",
    "personal_held_out_loss",
    "local_held_out_loss",
    "audit_counts",
)


def policy_toml(
    *,
    required: bool = False,
    per_job: float = 100.0,
    total: float = 100.0,
    delta: float = 1e-2,
    may_leave: tuple[str, ...] = ALL_STATISTICS,
    peers: Iterable[str] = (),
    masks_required: bool = False,
    min_survivors: int = 2,
    **rules: float | str,
) -> str:
    """One line, ``policy = {…}``; lets everything pass unless told otherwise."""
    values = [
        f"required = {str(required).lower()}",
        f"budgets = {{ per_job = {{ epsilon = {per_job}, delta = {delta} }}, "
        f"total = {{ epsilon = {total}, delta = {delta} }} }}",
        f"may_leave = {list(may_leave)}",
        *(
            [
                f"secure_aggregation = {{ peers = {list(peers)}, required = {str(masks_required).lower()}, "
                f"min_survivors = {min_survivors} }}"
            ]
            if peers
            else []
        ),
        *(f"{name} = {value}" for name, value in rules.items()),
    ]
    return f"policy = {{ {', '.join(values)} }}".replace("'", '"')
