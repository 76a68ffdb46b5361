from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from custom.config import ExperimentConfig
from custom.diffusion.networks import Shapes
from custom.diffusion.split_denoiser import LOW_NOISE
from custom.egress import released_shapes
from custom.federation_config import PersonalConfig, UpdatesConfig
from custom.round_parts import (
    CONTROL,
    RoundParts,
    every_update,
    own_tensors,
    personal_shapes,
    round_parts,
    update_shapes,
)
from custom.stages import PREFIX, model_shapes
from custom.strict import ConfigError

DOWN = ("conv_in.*", "time_embed.*", "down_blocks.*")
UP = ("middle_block.*", "up_blocks.*", "out.*")


def changed(
    experiment: ExperimentConfig,
    *,
    rounds: int = 6,
    parts: tuple[tuple[str, ...], ...] | None = None,
    personal: PersonalConfig | None = None,
    variates: bool = False,
    first: int = 0,
    train: Literal["sent", "all"] = "sent",
) -> ExperimentConfig:
    autoencoder = experiment.autoencoder
    return replace(
        experiment,
        federation=replace(experiment.federation, rounds=rounds, control_variates=variates),
        updates=None if parts is None else UpdatesConfig(parts=parts, train=train),
        personal=personal,
        autoencoder=autoencoder and replace(autoencoder, rounds=first),
    )


def named(config: ExperimentConfig, *patterns: str) -> tuple[str, ...]:
    denoiser = (name for name in model_shapes(config) if not name.startswith(PREFIX))
    return tuple(name for name in denoiser if any(fnmatchcase(name, pattern) for pattern in patterns))


def parted(
    shared: tuple[str, ...], *, personal: tuple[str, ...] = (), waiting: tuple[str, ...] | None = None
) -> RoundParts:
    """Of a round; with nothing said of waiting, one where what does not leave rests."""
    resumed = personal if waiting is None else (*shared, *waiting, *personal)
    return RoundParts(shared=shared, waiting=waiting or (), personal=personal, resumed=resumed)


def test_without_switches_every_round_shares_all(experiment: ExperimentConfig) -> None:
    for number in range(2):
        assert round_parts(experiment, number) == parted(tuple(model_shapes(experiment)))
        assert update_shapes(experiment, number) == model_shapes(experiment)
    assert every_update(experiment) == {0: model_shapes(experiment)}


def test_parts_take_turns_in_the_model_s_order(experiment: ExperimentConfig) -> None:
    config = changed(experiment, parts=(UP[::-1], DOWN, ("*",)))
    for number in range(6):
        wanted = named(config, *(UP, DOWN, ("*",))[number % 3])
        assert round_parts(config, number) == parted(wanted)
        assert update_shapes(config, number) == {name: model_shapes(config)[name] for name in wanted}
    assert set(named(config, *UP)) | set(named(config, *DOWN)) == set(model_shapes(config))
    assert list(every_update(config)) == [0, 1, 2]


def test_personal_tensors_are_not_shared_after_the_first_rounds(experiment: ExperimentConfig) -> None:
    config = changed(experiment, personal=PersonalConfig(parts=("out.*", "conv_in.*"), shared_rounds=2))
    own = named(config, "out.*", "conv_in.*")
    for number in range(6):
        parts = round_parts(config, number)
        assert parts.own == parts.personal == parts.resumed == (() if number < 2 else own)
        assert set(parts.shared) == set(model_shapes(config)) - set(parts.own)
    assert list(every_update(config)) == [0, 2]


def test_personal_tensors_are_trained_while_parts_take_turns(experiment: ExperimentConfig) -> None:
    config = changed(experiment, parts=(DOWN, UP), personal=PersonalConfig(parts=("out.*",), shared_rounds=1))
    assert round_parts(config, 0) == parted(named(config, *DOWN))
    for number in range(1, 6):
        parts = round_parts(config, number)
        assert parts.own == parts.personal == named(config, "out.*")
        assert set(parts.shared) == set(named(config, *(DOWN if number % 2 == 0 else UP))) - set(parts.own)


def test_what_does_not_leave_waits_if_all_is_trained(experiment: ExperimentConfig) -> None:
    config = changed(experiment, parts=(DOWN, UP), train="all")
    resting = changed(experiment, parts=(DOWN, UP))
    for number in range(6):
        leaves, waits = (DOWN, UP)[:: 1 if number % 2 == 0 else -1]
        parts = round_parts(config, number)
        assert parts == parted(named(config, *leaves), waiting=named(config, *waits))
        assert parts.own == parts.waiting
        assert set(parts.resumed) == set(model_shapes(config))
        assert update_shapes(config, number) == update_shapes(resting, number), "the same leaves"
    assert every_update(config) == every_update(resting)


def test_what_waits_and_what_is_personal_do_not_mix(experiment: ExperimentConfig) -> None:
    personal = PersonalConfig(parts=("out.*", "conv_in.*"), shared_rounds=2)
    config = changed(experiment, parts=(DOWN, UP), personal=personal, train="all")
    for number in range(6):
        parts = round_parts(config, number)
        own = () if number < 2 else named(config, "out.*", "conv_in.*")
        assert parts.personal == own
        assert parts.shared == tuple(n for n in named(config, *(DOWN, UP)[number % 2]) if n not in own)
        assert parts.waiting == tuple(n for n in named(config, *(UP, DOWN)[number % 2]) if n not in own)
        assert parts.own == (*parts.waiting, *parts.personal)
        assert sorted(parts.resumed) == sorted(model_shapes(config))
    split = changed(experiment, parts=(DOWN, UP), personal=PersonalConfig(below_timestep=100), train="all")
    parts = round_parts(split, 2)
    low = tuple(LOW_NOISE + name for name in model_shapes(split))
    assert parts == parted(named(split, *DOWN), waiting=named(split, *UP), personal=low)


def test_a_denoiser_of_low_noise_is_the_site_s_own(experiment: ExperimentConfig) -> None:
    config = changed(experiment, personal=PersonalConfig(below_timestep=100, shared_rounds=3))
    names = tuple(model_shapes(config))
    assert round_parts(config, 2) == parted(names)
    assert round_parts(config, 3) == parted(names, personal=tuple(LOW_NOISE + name for name in names))
    assert list(every_update(config)) == [0], "what leaves is the same in all rounds"
    shapes = personal_shapes(config)
    assert set(shapes) == {*names, *round_parts(config, 3).own}
    assert all(shapes[LOW_NOISE + name] == shapes[name] for name in names)
    assert personal_shapes(experiment) == model_shapes(experiment)


def test_an_unsplit_personal_model_has_no_tensors_of_its_own(experiment: ExperimentConfig) -> None:
    config = changed(experiment, personal=PersonalConfig())
    assert all(round_parts(config, number).own == () for number in range(6))
    assert personal_shapes(config) == model_shapes(config)


def test_a_site_s_own_tensors_begin_as_the_global_ones(experiment: ExperimentConfig) -> None:
    weights = {
        name: torch.full(shape, float(place)) for place, (name, shape) in enumerate(model_shapes(experiment).items())
    }
    for personal in (PersonalConfig(parts=("out.*",)), PersonalConfig(below_timestep=100)):
        config = changed(experiment, personal=personal)
        assert own_tensors(config, weights, 0) == {}
        begun = own_tensors(config, weights, 1)
        assert tuple(begun) == round_parts(config, 1).own
        for name, tensor in begun.items():
            assert tensor is weights[name.removeprefix(LOW_NOISE)]


def test_control_variates_follow_the_weights_under_names_of_their_own(experiment: ExperimentConfig) -> None:
    config = changed(experiment, parts=(DOWN, UP), variates=True)
    plain = changed(experiment, parts=(DOWN, UP))
    for number in range(2):
        weights, sent = update_shapes(plain, number), update_shapes(config, number)
        assert list(sent) == [*weights, *(CONTROL + name for name in weights)]
        assert all(sent[CONTROL + name] == shape for name, shape in weights.items())


def test_with_an_autoencoder_the_denoiser_s_rounds_alone_have_parts(latent_experiment: ExperimentConfig) -> None:
    personal = PersonalConfig(parts=("out.*",), shared_rounds=2)
    config = changed(latent_experiment, rounds=8, first=3, parts=(DOWN, UP), personal=personal)
    encoder = tuple(name for name in model_shapes(config) if name.startswith(PREFIX))
    for number in range(3):
        assert round_parts(config, number) == parted(encoder)
    assert [round_parts(config, number).shared for number in (3, 4)] == [named(config, *DOWN), named(config, *UP)]
    assert round_parts(config, 4).own == ()
    for number in (5, 6, 7):
        assert round_parts(config, number).own == named(config, "out.*")
        assert not set(round_parts(config, number).shared) & {*encoder, *named(config, "out.*")}
    assert list(every_update(config)) == [0, 3, 4, 6], "round 5 shares what round 3 does"
    split = changed(latent_experiment, rounds=4, first=1, personal=PersonalConfig(below_timestep=100))
    assert not any(name.startswith(LOW_NOISE + PREFIX) for name in personal_shapes(split))
    assert set(round_parts(split, 2).own) == {LOW_NOISE + name for name in named(split, "*")}
    waits = changed(latent_experiment, rounds=4, first=2, parts=(DOWN, UP), train="all")
    assert round_parts(waits, 1) == parted(encoder)
    assert round_parts(waits, 3) == parted(named(waits, *UP), waiting=named(waits, *DOWN))


@pytest.mark.parametrize(
    ("parts", "personal", "named"),
    [
        ((DOWN, ("conv_uot.*",)), None, r"updates\.parts = 'conv_uot\.\*'"),
        (None, PersonalConfig(parts=("out.*", "conv_uot.*")), r"personal\.parts = 'conv_uot\.\*'"),
        ((DOWN, ("out.*",)), PersonalConfig(parts=("out.*",)), r"updates\.parts.*share nothing"),
        (None, PersonalConfig(parts=("*",)), "share nothing"),
        ((("low_noise.*",),), PersonalConfig(below_timestep=10), r"updates\.parts = 'low_noise"),
        ((("autoencoder.*",),), None, r"updates\.parts = 'autoencoder"),
    ],
)
def test_patterns_that_fit_nothing_and_rounds_that_share_nothing_are_refused(
    latent_experiment: ExperimentConfig,
    parts: tuple[tuple[str, ...], ...] | None,
    personal: PersonalConfig | None,
    named: str,
) -> None:
    config = changed(latent_experiment, rounds=5, first=1, parts=parts, personal=personal)
    with pytest.raises(ConfigError, match=named):
        every_update(config)
    with pytest.raises(ConfigError, match=named):
        released_shapes(config)  # before the first task is answered


PATTERNS = st.sampled_from(["*", "conv_in.*", "out.*", "down_blocks.*", "up_blocks.*", "middle_block.*"])
PERSONAL = st.one_of(
    st.none(),
    st.builds(
        PersonalConfig, parts=st.lists(PATTERNS, min_size=1, max_size=2).map(tuple), shared_rounds=st.integers(1, 2)
    ),
    st.builds(PersonalConfig, below_timestep=st.just(100), shared_rounds=st.integers(1, 2)),
    st.just(PersonalConfig()),
)
PARTS = st.one_of(
    st.none(),
    st.lists(st.lists(PATTERNS, min_size=1, max_size=2).map(tuple), min_size=1, max_size=4).map(tuple),
)


@settings(max_examples=60, deadline=None)
@given(
    rounds=st.integers(3, 9),
    first=st.integers(0, 3),
    parts=PARTS,
    personal=PERSONAL,
    variates=st.booleans(),
    waits=st.booleans(),
)
def test_every_update_is_what_some_round_sends_each_once(
    experiment: ExperimentConfig,
    latent_experiment: ExperimentConfig,
    rounds: int,
    first: int,
    parts: tuple[tuple[str, ...], ...] | None,
    personal: PersonalConfig | None,
    variates: bool,
    waits: bool,
) -> None:
    """The slow obvious reference: look at every round of the run."""
    base, waits = latent_experiment if first else experiment, waits and parts is not None
    config = changed(
        base,
        rounds=rounds + first,
        first=first,
        parts=parts,
        personal=personal,
        variates=variates and not waits,
        train="all" if waits else "sent",
    )
    found: dict[int, Shapes] = {}
    try:
        for number in range(rounds + first):
            sent, of_round = update_shapes(config, number), round_parts(config, number)
            kinds = (of_round.shared, of_round.waiting, of_round.personal)
            assert sum(map(len, kinds)) == len(set().union(*kinds)), "none is of two kinds"
            assert set(of_round.personal) <= set(of_round.resumed) <= set().union(*kinds)
            assert waits or not of_round.waiting
            if list(sent) not in [list(shapes) for shapes in found.values()]:
                found[number] = sent
    except ConfigError:
        with pytest.raises(ConfigError):
            every_update(config)
        return
    assert every_update(config) == found


def test_what_is_trained_in_every_round_leaves_in_some(experiment: ExperimentConfig) -> None:
    some = UpdatesConfig(parts=(("conv_in.*",), ("out.*",)), train="all")
    with pytest.raises(ConfigError, match=r"updates\.parts.*never leave"):
        round_parts(replace(experiment, updates=some), 0)
    assert round_parts(replace(experiment, updates=replace(some, train="sent")), 0).waiting == ()
