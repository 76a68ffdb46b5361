"""Remedies for sites that differ: each against its algorithm written out, and against NVFlare's where it has one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from custom.audit_evidence import claimed_privacy
from custom.config import ExperimentConfig
from custom.diffusion.networks import build_network
from custom.diffusion.objective import Objective, denoising
from custom.diffusion.schedule import build_schedule
from custom.diffusion.split_denoiser import LOW_NOISE
from custom.federation_config import PersonalConfig, ServerOptimizerConfig, UpdatesConfig
from custom.job_plan import privacy_plan
from custom.model_file import ModelFile, initial_model, load_model, save_checkpoint, save_model
from custom.personal import FINE_TUNE_RATE, site_models, without_guarantee
from custom.round_parts import CONTROL, personal_shapes, round_parts, update_shapes
from custom.server_step import moved, server_variates
from custom.site_file import HardwareConfig
from custom.site_state import SiteState
from custom.stages import Span, fresh_weights, stage_objective, stage_of, stage_shapes, stages
from custom.training import (
    LocalUpdate,
    PatientSampler,
    Progress,
    _derived_seed,
    _Drift,
    held_out_loss,
    moments,
    section,
    train_round,
    training_step,
)
from medical_data.cohort import Cohort

CPU = torch.device("cpu")
PARTS = (("conv_in.*", "down_blocks.*"), ("up_blocks.*", "out.*"))
HALVES = (("conv_in.*", "time_embed.*", "down_blocks.*"), ("middle_block.*", "up_blocks.*", "out.*"))


def with_rounds(experiment: ExperimentConfig, rounds: int, **federation: Any) -> ExperimentConfig:
    return replace(experiment, federation=replace(experiment.federation, rounds=rounds, **federation))


def with_proximal(experiment: ExperimentConfig, mu: float, **training: Any) -> ExperimentConfig:
    return replace(experiment, training=replace(experiment.training, proximal=mu, **training))


def darker(cohort: Cohort) -> Cohort:
    """A hospital whose images differ: bright where the others' are dark."""
    return replace(cohort, images=(-cohort.images).copy())


def some_weights(config: ExperimentConfig, seed: int) -> dict[str, Tensor]:
    """Fresh weights with noise on them: a fresh U-Net's last layer is zero, and lets no gradient through."""
    generator = torch.Generator().manual_seed(seed)
    weights = fresh_weights(config, seed=seed)
    return {name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}


def some_model(config: ExperimentConfig) -> ModelFile:
    weights = some_weights(config, 3)
    return ModelFile(experiment=config, rounds_done=0, weights=weights, ema=weights)


def local(
    experiment: ExperimentConfig,
    cohort: Cohort,
    weights: Mapping[str, Tensor],
    *,
    number: int = 0,
    site: str = "a",
    state: Mapping[str, Tensor] | None = None,
) -> LocalUpdate:
    return train_round(
        cohort=cohort,
        weights=weights,
        state=state or {},
        config=experiment,
        site=site,
        round_number=number,
        device=CPU,
    )


def mean(updates: list[LocalUpdate]) -> dict[str, NDArray[np.float32]]:
    names = updates[0].difference
    return {name: torch.stack([u.difference[name] for u in updates]).mean(dim=0).numpy() for name in names}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def close(one: Mapping[str, Tensor], other: Mapping[str, Tensor], *, atol: float = 1e-6) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=atol, rtol=1e-4)


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return length({name: tensor - other[name] for name, tensor in one.items()})


def length(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


# ---- FedProx


class Remembered(torch.optim.Optimizer):
    """Moves nothing, so that the gradients of a step can be looked at."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        pass


def test_the_proximal_gradient_is_that_of_the_term_in_the_loss_and_nvflare_s(experiment: ExperimentConfig) -> None:
    from nvflare.app_opt.pt.fedproxloss import PTFedProxLoss

    mu, schedule = 0.3, build_schedule(experiment.schedule)
    network = build_network(experiment.network, spatial_dims=2, seed=1)
    anchor = build_network(experiment.network, spatial_dims=2, seed=2)
    for parameter in anchor.parameters():
        parameter.requires_grad_(False)
    x0 = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(5))
    objective = denoising(network, schedule)
    loss = training_step(
        objective,
        Remembered(network.parameters()),
        x0,
        torch.Generator().manual_seed(6),
        gradient_clip=None,
        proximal=mu,
        anchors=list(zip(network.parameters(), anchor.parameters(), strict=True)),
    )
    ours = {name: parameter.grad for name, parameter in network.named_parameters()}

    generator = torch.Generator().manual_seed(6)
    noise, timesteps = torch.randn(x0.shape, generator=generator), torch.randint(1000, (4,), generator=generator)

    def plain() -> Tensor:
        return objective.loss(network, x0, noise, timesteps).mean()

    pairs = list(zip(network.parameters(), anchor.parameters(), strict=True))
    by_hand = mu / 2 * torch.stack([(parameter - fixed).square().sum() for parameter, fixed in pairs]).sum()
    for term in (by_hand, PTFedProxLoss(mu=mu)(network, anchor)):
        wanted = torch.autograd.grad(plain() + term, list(network.parameters()))
        for (name, found), gradient in zip(ours.items(), wanted, strict=True):
            torch.testing.assert_close(found, gradient, msg=lambda said, name=name: f"{name}: {said}")
    torch.testing.assert_close(loss, plain().detach())


def test_without_a_proximal_term_nothing_changes(experiment: ExperimentConfig, cohort: Cohort) -> None:
    weights = some_weights(experiment, 3)
    assert equal(
        local(experiment, cohort, weights).difference, local(with_proximal(experiment, 0.0), cohort, weights).difference
    )


def test_the_stronger_the_term_the_shorter_the_way(experiment: ExperimentConfig, cohort: Cohort) -> None:
    weights = some_weights(experiment, 3)
    lengths = [
        length(local(with_proximal(experiment, mu, steps_per_round=12), cohort, weights).difference)
        for mu in (0.0, 1.0, 100.0)
    ]
    assert lengths[0] > lengths[1] > lengths[2]


def test_the_term_draws_to_the_round_s_global_weights_and_leaves_own_tensors_alone(
    experiment: ExperimentConfig, cohort: Cohort
) -> None:
    """The slow obvious reference: the term in the loss, of what is shared."""
    mu = 10.0
    personal = PersonalConfig(parts=("out.*",))
    config = replace(with_proximal(experiment, mu, gradient_clip=None), personal=personal)
    weights = some_weights(config, 3)
    update = local(config, cohort, weights, number=1)
    objective = stage_objective(config, stage_of(config, 1), weights, CPU)
    named = dict(objective.network.named_parameters())
    shared = round_parts(config, 1).shared
    optimizer = torch.optim.AdamW(named.values(), weight_decay=config.training.weight_decay)
    generator = torch.Generator().manual_seed(_derived_seed(config.seed, "a", 1))
    draw = PatientSampler(cohort, generator)
    for step in range(3):
        x0 = draw(4)
        noise, timesteps = torch.randn(x0.shape, generator=generator), torch.randint(1000, (4,), generator=generator)
        apart = torch.stack([(named[name] - weights[name]).square().sum() for name in shared]).sum()
        optimizer.zero_grad()
        (objective.loss(objective.network, x0, noise, timesteps).mean() + mu / 2 * apart).backward()
        optimizer.param_groups[0]["lr"] = stage_of(config, 1).learning_rate(3 + step)
        optimizer.step()
    close(update.difference, {name: named[name].detach() - weights[name] for name in shared}, atol=2e-5)
    close(section(update.state, "own"), {name: named[name].detach() for name in round_parts(config, 1).own}, atol=2e-5)


# ---- SCAFFOLD


def adamw_steps(
    config: ExperimentConfig,
    cohort: Cohort,
    *,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    correction: Mapping[str, Tensor],
    site: str,
    number: int,
) -> float:
    """Steps of one site and round: y ← y - η (g + c - c_i), where η g is AdamW's step; returns Σ η."""
    objective, stage = denoising(network, build_schedule(config.schedule)), stage_of(config, number)
    generator = torch.Generator().manual_seed(_derived_seed(config.seed, site, number))
    draw, rates = PatientSampler(cohort, generator), 0.0
    for step in range(config.training.steps_per_round):
        rate = stage.learning_rate(number * config.training.steps_per_round + step)
        optimizer.param_groups[0]["lr"] = rate
        x0 = draw(config.training.batch_size)
        noise = torch.randn(x0.shape, generator=generator)
        timesteps = torch.randint(1000, (len(x0),), generator=generator)
        optimizer.zero_grad()
        objective.loss(network, x0, noise, timesteps).mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.training.gradient_clip)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter -= rate * correction[name]
        rates += rate
    return rates


def test_scaffold_is_its_algorithm_written_out(experiment: ExperimentConfig, cohort: Cohort, tmp_path: Path) -> None:
    """arXiv:1910.06378, algorithm 1 with option II, two of two sites, three rounds, across disks and checkpoints."""
    config = with_rounds(experiment, 3, control_variates=True)
    cohorts = {"a": cohort, "b": darker(cohort)}
    model = some_model(config)
    states = {site: SiteState(tmp_path / site) for site in cohorts}

    x = dict(model.weights)
    c = {name: torch.zeros_like(tensor) for name, tensor in x.items()}
    c_of = {site: dict(c) for site in cohorts}
    networks = {site: build_network(config.network, spatial_dims=2) for site in cohorts}
    optimizers = {
        site: torch.optim.AdamW(network.parameters(), weight_decay=config.training.weight_decay, fused=True)
        for site, network in networks.items()
    }
    for number in range(3):
        sent = {**model.weights, **server_variates(model, round_parts(config, number).shared)}
        updates = []
        for site in cohorts:
            update = local(config, cohorts[site], sent, number=number, site=site, state=states[site].before(number))
            states[site].save(number, update.state)
            updates.append(update)
        save_checkpoint(tmp_path / "model.safetensors", moved(model, mean(updates)))
        model = load_model(tmp_path / "model.safetensors")

        changes, ends = [], []
        for site, network in networks.items():
            network.load_state_dict(x)
            rates = adamw_steps(
                config,
                cohorts[site],
                network=network,
                optimizer=optimizers[site],
                correction={name: c[name] - c_of[site][name] for name in c},
                site=site,
                number=number,
            )
            y = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
            plus = {name: c_of[site][name] - c[name] + (x[name] - y[name]) / rates for name in c}
            changes.append({name: plus[name] - c_of[site][name] for name in c})
            ends.append(y)
            c_of[site] = plus
        x = {name: torch.stack([end[name] for end in ends]).mean(dim=0) for name in x}
        c = {name: c[name] + torch.stack([change[name] for change in changes]).mean(dim=0) for name in c}

        close(model.weights, x, atol=2e-5)
        close(
            {name.removeprefix(CONTROL): tensor for name, tensor in model.optimizer.items()}, c, atol=2e-3
        )  # of differences of weights, divided by Σ η of 10⁻³
        for site in cohorts:
            close(section(states[site].before(number + 1), "control"), c_of[site], atol=2e-3)
    assert max(float(tensor.abs().max()) for tensor in c.values()) > 0.5, "variates are of AdamW steps' size"


def test_the_variates_are_nvflare_s(experiment: ExperimentConfig) -> None:
    """PTScaffoldHelper with a constant learning rate, whatever an optimizer's steps are; two sites, three rounds."""
    from nvflare.app_opt.pt.scaffold import PTScaffoldHelper

    config, rate, generator = with_rounds(experiment, 3, control_variates=True), 0.1, torch.Generator().manual_seed(0)
    x: dict[str, Tensor] = {
        "weight": torch.randn(3, 4, generator=generator),
        "bias": torch.randn(3, generator=generator),
    }
    c = {name: torch.zeros_like(tensor) for name, tensor in x.items()}
    states: list[dict[str, Tensor]] = [{}, {}]
    theirs, helpers = [nn.Linear(4, 3), nn.Linear(4, 3)], [PTScaffoldHelper(), PTScaffoldHelper()]
    for helper, network in zip(helpers, theirs, strict=True):
        helper.init(network)
    for _ in range(3):
        ends, changes = [], []
        for place in range(2):
            ours, whole = nn.Linear(4, 3), nn.Linear(4, 3)
            for network in (ours, whole, theirs[place]):
                network.load_state_dict(x)
            drift = _Drift(
                {**x, **{CONTROL + name: tensor for name, tensor in c.items()}},
                states[place],
                dict(ours.named_parameters()),
                config,
            )
            helpers[place].load_global_controls({name: tensor.numpy() for name, tensor in c.items()})
            c_global, c_local = helpers[place].get_params()
            for _ in range(4):
                with torch.no_grad():
                    for one, other in zip(ours.parameters(), theirs[place].parameters(), strict=True):
                        step = (place + 1) * torch.randn(one.shape, generator=generator)
                        one -= rate * step
                        other -= rate * step
                drift.correct(rate)
                helpers[place].model_update(theirs[place], rate, c_global, c_local)
            helpers[place].terms_update(theirs[place], rate, c_global, c_local, whole)
            end = {name: tensor.detach().clone() for name, tensor in ours.named_parameters()}
            close(end, {name: tensor.detach() for name, tensor in theirs[place].named_parameters()})
            variates, leaves = drift.settled({name: end[name] - x[name] for name in x})
            change = {name: tensor / (4 * rate) for name, tensor in leaves.items()}
            close(
                change, {n: torch.tensor(array) for n, array in helpers[place].get_delta_controls().items()}, atol=1e-5
            )
            close(variates, helpers[place].c_local.state_dict(), atol=1e-5)
            states[place] = {f"control/{name}": tensor for name, tensor in variates.items()}
            ends.append(end)
            changes.append(change)
        x = {name: (ends[0][name] + ends[1][name]) / 2 for name in x}
        c = {name: c[name] + (changes[0][name] + changes[1][name]) / 2 for name in c}


def test_of_sites_that_do_not_differ_scaffold_is_fedavg(experiment: ExperimentConfig, cohort: Cohort) -> None:
    plain, config = with_rounds(experiment, 3), with_rounds(experiment, 3, control_variates=True)
    model, average = some_model(config), some_model(plain)
    state: dict[str, Tensor] = {}
    average_state: dict[str, Tensor] = {}
    for number in range(3):
        sent = {**model.weights, **server_variates(model, round_parts(config, number).shared)}
        update = local(config, cohort, sent, number=number, state=state)
        alone = local(plain, cohort, average.weights, number=number, state=average_state)
        state, average_state = update.state, alone.state
        model, average = moved(model, mean([update, update])), moved(average, mean([alone, alone]))
        close(model.weights, average.weights, atol=1e-5)
        assert not average.optimizer
        for name, own in section(state, "control").items():
            torch.testing.assert_close(model.optimizer[CONTROL + name], own, atol=1e-3, rtol=1e-3)


def test_variates_follow_those_who_were_there_and_the_steps_that_were_made(experiment: ExperimentConfig) -> None:
    """c ← c + |S|/N mean(c_i⁺ - c_i), where the messages say (c_i⁺ - c_i) Σ η."""
    config = with_proximal(with_rounds(experiment, 4, control_variates=True), 0.0, local_epochs="auto")
    model = replace(initial_model(config), rounds_done=2)
    names = sorted(model.weights)[:2]
    difference = {name: np.ones(tuple(model.weights[name].shape), np.float32) for name in names}
    difference |= {CONTROL + name: np.full(array.shape, 2.0, np.float32) for name, array in difference.items()}
    stage = stage_of(config, 2)
    assert stage.span(2) == Span(first=6, steps=6), "two epochs in one round"
    after = moved(model, difference, present=0.25)
    rates = sum(stage.learning_rate(step) for step in range(6, 12))
    for name in names:
        torch.testing.assert_close(after.weights[name], model.weights[name] + 1)
        expected = torch.full_like(model.weights[name], 2 * 0.25 / rates)
        torch.testing.assert_close(after.optimizer[CONTROL + name], expected)
    assert set(after.optimizer) == {CONTROL + name for name in names}
    after = replace(after, rounds_done=1)
    again = moved(after, {name: array for name, array in difference.items() if names[0] in name})
    assert torch.equal(again.optimizer[CONTROL + names[1]], after.optimizer[CONTROL + names[1]]), "it rested"
    sent = server_variates(again, [*names, "out.2.conv.bias"])
    assert torch.equal(sent[CONTROL + names[0]], again.optimizer[CONTROL + names[0]])
    assert torch.equal(sent[CONTROL + "out.2.conv.bias"], torch.zeros(1)), "there is none yet"
    assert server_variates(initial_model(experiment), names) == {}


def test_a_site_s_first_variates_are_zero_and_the_second_stage_s_begin_anew(
    latent_experiment: ExperimentConfig,
) -> None:
    config = with_rounds(latent_experiment, 3, control_variates=True)
    model = initial_model(config)
    shapes = update_shapes(config, 0)
    after = moved(model, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    assert set(after.optimizer) == {name for name in shapes if name.startswith(CONTROL)}
    sent = server_variates(after, round_parts(config, 1).shared)
    assert set(sent) == {name for name in update_shapes(config, 1) if name.startswith(CONTROL)}
    assert not any(tensor.any() for tensor in sent.values())
    ones = {name: np.ones(shape, np.float32) for name, shape in update_shapes(config, 1).items()}
    second = moved(after, ones)
    assert set(second.optimizer) == set(sent), "the autoencoder's are gone"


# ---- the server's optimizer

OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.8),
    "nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.8, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.5, betas=(0.8, 0.95), eps=1e-2),
}
Name = Literal["momentum", "nesterov", "adam"]


def with_server(experiment: ExperimentConfig, name: Name, rounds: int = 4) -> ExperimentConfig:
    asked = ServerOptimizerConfig(name=name, learning_rate=0.5, momentum=0.8, second_momentum=0.95, epsilon=1e-2)
    return with_rounds(experiment, rounds, server_optimizer=asked)


def some_differences(shapes: Mapping[str, tuple[int, ...]], count: int) -> list[dict[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(0)
    return [
        {name: np.asarray(rng.normal(0, 0.01, shape), np.float32) for name, shape in shapes.items()}
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_server_s_steps_are_torch_s_along_the_mean_difference_also_across_checkpoints(
    experiment: ExperimentConfig, tmp_path: Path, name: Name
) -> None:
    config = with_server(experiment, name)
    model = initial_model(config)
    reference = {key: nn.Parameter(tensor.clone()) for key, tensor in model.weights.items()}
    optimizer = OPTIMIZERS[name](list(reference.values()))
    for number, difference in enumerate(some_differences(update_shapes(config, 0), 4)):
        save_checkpoint(tmp_path / "model.safetensors", moved(model, difference))
        model = load_model(tmp_path / "model.safetensors")
        for key, parameter in reference.items():
            parameter.grad = -torch.tensor(difference[key])
        optimizer.step()
        assert model.rounds_done == number + 1
        close(model.weights, {key: parameter.detach() for key, parameter in reference.items()}, atol=1e-7)
        assert model.optimizer


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_server_s_steps_are_nvflare_s_fedopt(experiment: ExperimentConfig, name: Name) -> None:
    from nvflare.app_opt.pt.fedopt import PTFedOptModelShareableGenerator

    config = with_server(experiment, name)
    model = initial_model(config)
    theirs = build_network(config.network, spatial_dims=2)
    theirs.load_state_dict(model.weights)
    # What its START_RUN would make of a job's components.
    fedopt = PTFedOptModelShareableGenerator(optimizer_args={"path": name}, source_model=theirs, device="cpu")
    fedopt.model, fedopt.optimizer = theirs, OPTIMIZERS[name](theirs.parameters())
    for difference in some_differences(update_shapes(config, 0), 3):
        model = moved(model, difference)
        weights, updated = fedopt.server_update(difference)
        assert set(updated) == set(difference)
        close(model.weights, weights, atol=1e-7)


def test_a_rate_of_one_without_momentum_is_fedavg(experiment: ExperimentConfig) -> None:
    asked = ServerOptimizerConfig(name="momentum", learning_rate=1.0, momentum=1e-9)
    model, average = initial_model(with_rounds(experiment, 3, server_optimizer=asked)), initial_model(experiment)
    average = replace(average, experiment=with_rounds(experiment, 3))
    for difference in some_differences(update_shapes(experiment, 0), 3):
        model, average = moved(model, difference), moved(average, difference)
        close(model.weights, average.weights, atol=1e-7)
    assert not average.optimizer


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_part_that_rests_keeps_its_weights_and_its_moments(experiment: ExperimentConfig, name: Name) -> None:
    config = replace(with_server(experiment, name), updates=UpdatesConfig(parts=PARTS))
    model = initial_model(config)
    by_round = [some_differences(update_shapes(config, number), 4)[number] for number in range(4)]
    references = []
    for part in range(2):
        trained = {key: nn.Parameter(model.weights[key].clone()) for key in update_shapes(config, part)}
        references.append((trained, OPTIMIZERS[name](list(trained.values()))))
    start = model.weights
    for number, difference in enumerate(by_round):
        before, model = model, moved(model, difference)
        trained, optimizer = references[number % 2]
        for key, parameter in trained.items():
            parameter.grad = -torch.tensor(difference[key])
        optimizer.step()
        resting = {key: tensor for key, tensor in before.optimizer.items() if key.rpartition("/")[0] not in trained}
        assert all(torch.equal(model.optimizer[key], tensor) for key, tensor in resting.items())
        assert bool(resting) == (number > 0)
    for trained, _ in references:
        close({key: model.weights[key] for key in trained}, {k: p.detach() for k, p in trained.items()}, atol=1e-7)
    never = set(start) - {key for trained, _ in references for key in trained}
    assert never
    assert all(torch.equal(model.weights[key], start[key]) for key in never)


def test_with_the_second_stage_the_server_s_optimizer_begins_anew(latent_experiment: ExperimentConfig) -> None:
    config = with_server(latent_experiment, "momentum", rounds=3)
    first, second = (stage_shapes(config, stage) for stage in stages(config))
    model = moved(initial_model(config), some_differences(first, 1)[0])
    assert set(model.optimizer) == {f"{name}/momentum_buffer" for name in first}
    (difference,) = some_differences(second, 1)
    after = moved(model, difference)
    assert set(after.optimizer) == {f"{name}/momentum_buffer" for name in second}
    for name, array in difference.items():
        torch.testing.assert_close(after.weights[name], model.weights[name] + 0.5 * torch.tensor(array))
    # As if whatever a checkpoint held of another stage had never been.
    close(moved(replace(model, optimizer={}), difference).weights, after.weights, atol=0)


# ---- parts


def test_a_round_of_a_part_moves_nothing_else_and_a_resting_part_keeps_its_moments(
    experiment: ExperimentConfig, cohort: Cohort
) -> None:
    config = replace(with_rounds(experiment, 4), updates=UpdatesConfig(parts=PARTS))
    weights, state = some_weights(config, 3), dict[str, Tensor]()
    for number in range(4):
        before, update = state, local(config, cohort, weights, number=number, state=state)
        shared = round_parts(config, number).shared
        assert tuple(update.difference) == shared
        assert all(tensor.abs().max() > 0 for name, tensor in update.difference.items() if name.endswith("weight"))
        weights = {name: tensor + update.difference.get(name, 0) for name, tensor in weights.items()}
        state = update.state
        rested = {key: t for key, t in before.items() if key.rpartition("/")[0] not in shared}
        assert equal({key: state[key] for key in rested}, rested)
        steps = {float(state[f"{name}/step"]) for name in shared}
        assert steps == {3.0 * (number // 2 + 1)}
    assert {key.rpartition("/")[0] for key in moments(state)} == {
        name for number in range(2) for name in round_parts(config, number).shared
    }


def test_tensors_that_rest_stand_still_while_the_others_are_trained(
    experiment: ExperimentConfig, cohort: Cohort
) -> None:
    """The slow obvious reference: an optimizer that knows the part's tensors only."""
    config = replace(experiment, updates=UpdatesConfig(parts=PARTS))
    config = replace(config, training=replace(config.training, gradient_clip=None))
    weights = some_weights(config, 3)
    update = local(config, cohort, weights)
    network = build_network(config.network, spatial_dims=2)
    network.load_state_dict(weights)
    named = dict(network.named_parameters())
    shared = round_parts(config, 0).shared
    optimizer = torch.optim.AdamW([named[name] for name in shared], weight_decay=config.training.weight_decay)
    generator = torch.Generator().manual_seed(_derived_seed(config.seed, "a", 0))
    draw, objective = PatientSampler(cohort, generator), denoising(network, build_schedule(config.schedule))
    for step in range(3):
        optimizer.param_groups[0]["lr"] = stage_of(config, 0).learning_rate(step)
        training_step(objective, optimizer, draw(4), generator, gradient_clip=None)
    close(update.difference, {name: named[name].detach() - weights[name] for name in shared}, atol=2e-5)


# ---- parts that are trained while they wait


def waiting(experiment: ExperimentConfig, rounds: int = 4, **training: Any) -> ExperimentConfig:
    config = replace(with_rounds(experiment, rounds), updates=UpdatesConfig(parts=HALVES, train="all"))
    return replace(config, training=replace(config.training, **training))


def test_what_waits_is_each_site_s_own_until_its_turn(
    experiment: ExperimentConfig, cohort: Cohort, tmp_path: Path
) -> None:
    """The slow obvious reference: a network and an optimizer a site; in turn half is set to the sites' mean."""
    config = waiting(experiment)
    cohorts = {"a": cohort, "b": darker(cohort)}
    model, states = some_model(config), {site: SiteState(tmp_path / site) for site in cohorts}

    networks = {site: build_network(config.network, spatial_dims=2) for site in cohorts}
    for network in networks.values():
        network.load_state_dict(model.weights)
    named = {site: dict(network.named_parameters()) for site, network in networks.items()}
    optimizers = {
        site: torch.optim.AdamW(network.parameters(), weight_decay=config.training.weight_decay, fused=True)
        for site, network in networks.items()
    }
    x, none = dict(model.weights), {name: torch.zeros(()) for name in model.weights}
    for number in range(4):
        leaves, waits = HALVES[number % 2], HALVES[1 - number % 2]
        updates = []
        for site in cohorts:
            state = states[site].before(number)
            update = local(config, cohorts[site], model.weights, number=number, site=site, state=state)
            states[site].save(number, update.state)
            updates.append(update)
            adamw_steps(
                config,
                cohorts[site],
                network=networks[site],
                optimizer=optimizers[site],
                correction=none,
                site=site,
                number=number,
            )
        before, model = model.weights, moved(model, mean(updates))

        turn = {name for name in x if any(fnmatchcase(name, pattern) for pattern in leaves)}
        assert {name for name in x if any(fnmatchcase(name, pattern) for pattern in waits)} == set(x) - turn
        with torch.no_grad():
            for name in turn:
                x[name] = torch.stack([named[site][name] for site in cohorts]).mean(dim=0)
        assert all(set(update.difference) == turn for update in updates)
        close(model.weights, x, atol=2e-5)
        assert all(torch.equal(model.weights[name], before[name]) for name in set(x) - turn), "the server's rests"
        for site in cohorts:
            kept = section(states[site].before(number + 1), "own")
            close(kept, {name: named[site][name].detach() for name in set(x) - turn}, atol=2e-5)
            assert distance(kept, {name: before[name] for name in kept}) > 1e-3, "it was trained"
            with torch.no_grad():
                for name in turn:
                    named[site][name].copy_(x[name])
        one, other = (section(states[site].before(number + 1), "own") for site in cohorts)
        assert distance(one, other) > 1e-3, "each site has its own"


@pytest.mark.parametrize("rounds", [3, 4])
def test_alone_a_site_that_trains_all_trains_as_if_all_left(
    experiment: ExperimentConfig, cohort: Cohort, rounds: int
) -> None:
    """Its copy of what waits and the global model's rest are a plain run's model, moments and all."""
    config, plain = waiting(experiment, rounds), with_rounds(experiment, rounds)
    model, every = some_model(config), some_model(plain)
    state, plain_state = dict[str, Tensor](), dict[str, Tensor]()
    for number in range(rounds):
        update = local(config, cohort, model.weights, number=number, state=state)
        model, state = moved(model, mean([update])), update.state
        alone = local(plain, cohort, every.weights, number=number, state=plain_state)
        every, plain_state = moved(every, mean([alone])), alone.state
        # But for what w + (w' - w) rounds, which waits in another place.
        close({**model.weights, **section(state, "own")}, every.weights, atol=5e-5)
        close(moments(state), moments(plain_state), atol=1e-5)
        assert update.metrics["train_loss"] == pytest.approx(alone.metrics["train_loss"], rel=1e-4)
    resting = round_parts(config, rounds - 1).waiting
    assert resting
    behind = {name: model.weights[name] for name in resting}
    assert distance(behind, every.weights) > 1e-3, "the global model is a round behind"


def test_what_waits_begins_as_the_site_left_it_and_leaves_as_the_way_from_the_global_weights(
    experiment: ExperimentConfig, cohort: Cohort
) -> None:
    config = waiting(experiment)
    weights, elsewhere = some_weights(config, 3), some_weights(config, 4)
    shared, waits = round_parts(config, 1).shared, round_parts(config, 1).waiting
    # Kept after round 0: what leaves in round 1.
    state = {f"own/{name}": elsewhere[name] for name in shared}
    update = local(config, cohort, weights, number=1, state=state)
    begun = {**weights, **{name: elsewhere[name] for name in shared}}
    from_there = local(with_rounds(experiment, 4), cohort, begun, number=1)
    for name in shared:
        expected = from_there.difference[name] + elsewhere[name] - weights[name]
        torch.testing.assert_close(update.difference[name], expected, atol=1e-6, rtol=1e-5)
    assert set(section(update.state, "own")) == set(waits), "what has left is the server's again"
    for name, tensor in section(update.state, "own").items():
        torch.testing.assert_close(tensor - weights[name], from_there.difference[name], atol=1e-6, rtol=1e-5)
    resting = replace(config, updates=UpdatesConfig(parts=HALVES))
    assert section(local(resting, cohort, weights, number=1, state=state).state, "own") == {}
    assert equal(
        local(resting, cohort, weights, number=1, state=state).difference,
        local(resting, cohort, weights, number=1).difference,
    ), "without it nothing begins anywhere but at the global weights"


def test_the_held_out_loss_is_the_global_model_s_also_while_parts_wait(
    experiment: ExperimentConfig, cohort: Cohort
) -> None:
    config = waiting(experiment)
    weights = some_weights(config, 3)
    state = {f"own/{name}": tensor + 0.1 for name, tensor in weights.items() if name in round_parts(config, 1).shared}
    whole = stage_objective(config, stage_of(config, 1), weights, CPU)
    update = local(config, cohort, weights, number=1, state=state)
    assert update.metrics["held_out_loss"] == held_out_loss(whole, cohort, CPU)


@pytest.mark.parametrize("last", [2, 3])
def test_a_personal_model_has_nothing_in_it_of_what_waits(
    experiment: ExperimentConfig, cohort: Cohort, last: int
) -> None:
    personal = PersonalConfig(parts=("out.*", "conv_in.*"), fine_tune_steps=2)
    config = replace(waiting(experiment, last + 1), personal=personal)
    weights = some_weights(config, 5)
    state = dict[str, Tensor]()
    for number in range(last + 1):
        state = local(config, cohort, some_weights(config, 6), number=number, state=state).state
    parts = round_parts(config, last)
    assert parts.waiting
    assert parts.personal
    assert set(section(state, "own")) == {*parts.waiting, *parts.personal}
    found = models_of(config, cohort, weights, state)
    without = {key: tensor for key, tensor in state.items() if key.removeprefix("own/") not in parts.waiting}
    assert len(without) == len(state) - len(parts.waiting)
    assert equal(found.personal, models_of(config, cohort, weights, without).personal)
    begun = {name: tensor for name, tensor in section(state, "own").items() if name in parts.personal}
    in_weights = models_of(replace(config, personal=replace(personal, parts=None)), cohort, {**weights, **begun}, {})
    assert equal(found.personal, in_weights.personal)


# ---- personal models

SPLITS = [PersonalConfig(parts=("out.*", "conv_in.*")), PersonalConfig(below_timestep=300)]


@pytest.mark.parametrize("personal", SPLITS, ids=["parts", "below_timestep"])
def test_own_tensors_stay_at_the_site_and_are_carried_on(
    experiment: ExperimentConfig, cohort: Cohort, tmp_path: Path, personal: PersonalConfig
) -> None:
    config = replace(with_rounds(experiment, 4), personal=personal)
    states, weights = SiteState(tmp_path), some_weights(config, 3)
    own_before: dict[str, Tensor] = {}
    for number in range(4):
        update = local(config, cohort, weights, number=number, state=states.before(number))
        states.save(number, update.state)
        parts, own = round_parts(config, number), section(update.state, "own")
        assert {name: tuple(t.shape) for name, t in update.difference.items()} == update_shapes(config, number)
        assert not set(update.difference) & set(parts.own)
        assert set(own) == set(parts.own)
        if number == 1:  # they begin as the global ones
            own_before = {name: weights[name.removeprefix(LOW_NOISE)] for name in own}
        moved_by = {name: float((tensor - own_before[name]).abs().max()) for name, tensor in own.items()}
        # A round moves a weight by the sum of its learning rates and a little.
        assert all(0 < change < 3 * 3 * 2e-3 for name, change in moved_by.items() if name.endswith("weight"))
        own_before = own
        weights = {name: tensor + update.difference.get(name, 0) for name, tensor in weights.items()}
    assert {"out.2.conv.weight", LOW_NOISE + "out.2.conv.weight"} & set(own_before)


@pytest.mark.parametrize("personal", SPLITS, ids=["parts", "below_timestep"])
def test_the_held_out_loss_is_the_global_model_s(
    experiment: ExperimentConfig, cohort: Cohort, personal: PersonalConfig
) -> None:
    config = replace(with_rounds(experiment, 4), personal=personal)
    weights = some_weights(config, 3)
    first = local(config, cohort, weights, number=1)
    second = local(config, cohort, weights, number=2, state=first.state)
    whole = stage_objective(config, stage_of(config, 2), weights, CPU)
    assert second.metrics["held_out_loss"] == first.metrics["held_out_loss"] == held_out_loss(whole, cohort, CPU)
    own = section(first.state, "own")
    personal_model = stage_objective(config, stage_of(config, 2), {**weights, **own}, CPU)
    assert held_out_loss(personal_model, cohort, CPU) != first.metrics["held_out_loss"]


def test_own_tensors_are_what_a_round_trains_with(experiment: ExperimentConfig, cohort: Cohort) -> None:
    """Whatever a site has kept of its own tensors stands in for the global ones."""
    config = replace(with_rounds(experiment, 4), personal=PersonalConfig(parts=("out.*",)))
    weights, kept = some_weights(config, 3), some_weights(config, 4)
    own = {name: kept[name] + 0.1 for name in round_parts(config, 1).own}
    with_own = local(config, cohort, weights, number=1, state={f"own/{name}": t for name, t in own.items()})
    in_weights = local(replace(config, personal=None), cohort, {**weights, **own}, number=1)
    for name in round_parts(config, 1).shared:
        assert torch.equal(with_own.difference[name], in_weights.difference[name])
    for name, tensor in own.items():
        change = section(with_own.state, "own")[name] - tensor
        torch.testing.assert_close(change, in_weights.difference[name], atol=1e-7, rtol=1e-5)


def models_of(
    config: ExperimentConfig, cohort: Cohort, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> Any:
    return site_models(
        cohort=cohort, weights=weights, state=state, config=config, site="a", device=CPU, hardware=HardwareConfig()
    )


@pytest.mark.parametrize("personal", [*SPLITS, PersonalConfig()], ids=["parts", "below_timestep", "whole"])
def test_a_personal_model_is_the_global_one_with_own_tensors_trained_on(
    experiment: ExperimentConfig, cohort: Cohort, personal: PersonalConfig
) -> None:
    """The slow obvious reference of both models."""
    config = replace(with_rounds(experiment, 3), personal=replace(personal, fine_tune_steps=4))
    weights, trained = some_weights(config, 5), local(config, cohort, some_weights(config, 6), number=2)
    models = models_of(config, cohort, weights, trained.state)
    own = section(trained.state, "own")
    assert set(own) == set(round_parts(config, 2).own)
    start = {**weights, **own}
    assert {name: tuple(t.shape) for name, t in models.personal.items()} == personal_shapes(config)

    objective = stage_objective(config, stages(config)[-1], start, CPU)
    optimizer = torch.optim.AdamW(objective.network.parameters(), weight_decay=config.training.weight_decay, fused=True)
    generator = torch.Generator().manual_seed(config.seed)
    draw = PatientSampler(cohort, generator)
    for step in range(4):
        rate = FINE_TUNE_RATE * config.training.learning_rate * (1 + math.cos(math.pi * step / 4)) / 2
        optimizer.param_groups[0]["lr"] = rate
        training_step(objective, optimizer, draw(4), generator, gradient_clip=1.0)
    close(models.personal, {name: p.detach() for name, p in objective.network.named_parameters()}, atol=1e-6)

    steps = 3 * config.training.steps_per_round + 4
    training = replace(config.training, steps_per_round=steps)
    alone = with_rounds(replace(config, personal=None, training=training), 1, min_responses=1)
    fresh = fresh_weights(alone, seed=config.seed)
    update = local(alone, cohort, fresh)
    close(models.local, {name: fresh[name] + delta for name, delta in update.difference.items()}, atol=1e-7)


def test_a_site_s_own_training_has_nothing_of_a_federation_in_it(experiment: ExperimentConfig, cohort: Cohort) -> None:
    plain = replace(experiment, personal=PersonalConfig(fine_tune_steps=2))
    switched = with_proximal(with_rounds(plain, 2, control_variates=True), 1.0, local_epochs="auto")
    switched = replace(switched, updates=UpdatesConfig(parts=PARTS))
    weights = some_weights(plain, 5)
    state = {"control/out.2.conv.bias": torch.ones(1), "lost/out.2.conv.bias": torch.ones(1)}
    one, other = models_of(plain, cohort, weights, {}), models_of(switched, cohort, weights, state)
    assert equal(one.local, other.local)
    assert equal(one.personal, other.personal)


def test_a_site_without_own_tensors_yet_fine_tunes_the_global_model(
    experiment: ExperimentConfig, cohort: Cohort
) -> None:
    for personal in SPLITS:
        config = replace(experiment, personal=replace(personal, fine_tune_steps=1))
        models = models_of(config, cohort, some_weights(config, 5), {})
        assert set(models.personal) == set(fresh_weights(config))


def test_on_latents_both_models_keep_the_autoencoder(latent_experiment: ExperimentConfig, cohort: Cohort) -> None:
    config = replace(latent_experiment, personal=PersonalConfig(fine_tune_steps=2))
    rng = np.random.default_rng(0)
    latents = replace(cohort, images=rng.normal(size=(24, *config.denoised_shape)).astype(np.float32))
    weights = some_weights(config, 5)
    models = models_of(config, latents, weights, {})
    for tensors in (models.personal, models.local):
        assert set(tensors) == set(weights)
        kept = {name for name in weights if torch.equal(tensors[name], weights[name])}
        assert {name for name in weights if name.startswith("autoencoder.")} <= kept
        assert "out.2.conv.weight" not in kept


def objective_of(config: ExperimentConfig, weights: Mapping[str, Tensor]) -> Objective:
    return stage_objective(config, stages(config)[-1], weights, CPU)


@pytest.mark.parametrize(
    "personal", [PersonalConfig(), PersonalConfig(parts=("up_blocks.*", "out.*"))], ids=["whole", "parts"]
)
def test_where_sites_differ_the_personal_model_is_better_at_its_own_site(
    experiment: ExperimentConfig, cohort: Cohort, personal: PersonalConfig
) -> None:
    config = replace(with_rounds(experiment, 3), personal=replace(personal, fine_tune_steps=40))
    training = replace(config.training, steps_per_round=12, learning_rate=0.01)
    config = replace(config, training=training)
    cohorts = {"a": cohort, "b": darker(cohort)}
    model, states = initial_model(config), {site: dict[str, Tensor]() for site in cohorts}
    for number in range(3):
        updates = {
            site: local(config, cohorts[site], model.weights, number=number, site=site, state=states[site])
            for site in cohorts
        }
        states = {site: update.state for site, update in updates.items()}
        model = moved(model, mean(list(updates.values())))
    of_global = held_out_loss(objective_of(config, model.weights), cohort, CPU)
    models = models_of(config, cohort, model.weights, states["a"])
    of_personal = held_out_loss(objective_of(config, models.personal), cohort, CPU)
    assert of_personal < 0.9 * of_global


def test_a_personal_model_of_a_private_job_claims_no_guarantee(
    private_experiment: ExperimentConfig, cohort: Cohort, tmp_path: Path
) -> None:
    """Its file is what an audit, a model card and a release read the claim from."""
    config = replace(private_experiment, personal=PersonalConfig(fine_tune_steps=2))
    assert privacy_plan(config) is not None
    weights = fresh_weights(config, seed=1)
    models = site_models(
        cohort=cohort, weights=weights, state={}, config=config, site="a", device=CPU, hardware=HardwareConfig()
    )
    said = without_guarantee(config)
    model = ModelFile(experiment=said, rounds_done=1, weights=models.personal, ema=models.personal)
    save_model(tmp_path / "personal.safetensors", model)
    assert claimed_privacy(load_model(tmp_path / "personal.safetensors"), lower_bounds=(), commitment=None) is None
    assert without_guarantee(said) == said


def test_whoever_follows_the_work_on_a_personal_model_can_end_it(experiment: ExperimentConfig, cohort: Cohort) -> None:
    config = replace(experiment, personal=PersonalConfig(fine_tune_steps=3))
    done: dict[str, list[int]] = {}

    def follow(what: str, steps: int) -> Progress:
        done[what] = [steps]

        def progress(step: int, loss: float) -> None:
            done[what].append(step)
            if what == "personal model" and step == 2:
                raise InterruptedError

        return progress

    with pytest.raises(InterruptedError):
        site_models(
            cohort=cohort,
            weights=fresh_weights(config, seed=1),
            state={},
            config=config,
            site="a",
            device=CPU,
            hardware=HardwareConfig(),
            progress=follow,
        )
    alone = config.federation.rounds * config.training.steps_per_round + 3
    assert done == {"model of this site alone": [alone, *range(1, alone + 1)], "personal model": [3, 1, 2]}
