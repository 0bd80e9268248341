"""What every evaluator owes, and what modalities name: roles, refusals, settings that parsers build, and paths that lead somewhere."""

import dataclasses
import inspect
import json

import pytest
import torch
from evaluate_stubs import StubEncoder, labelled, masked, truth
from jsonargparse import ArgumentParser

import glpretrain.evaluate
from glpretrain import modalities
from glpretrain.core.imports import imported
from glpretrain.data import Scenes, Source
from glpretrain.evaluate import ROLES, Evaluator, Features, Sources, default_evaluators

EVALUATORS = [
    owner
    for owner in map(vars(glpretrain.evaluate).get, glpretrain.evaluate.__all__)
    if isinstance(owner, type) and issubclass(owner, Evaluator) and owner is not Evaluator
]


def name_of(owner: type) -> str:
    return owner.__name__


def test_there_are_evaluators() -> None:
    assert len(EVALUATORS) >= 20


@pytest.mark.parametrize("owner", EVALUATORS, ids=name_of)
def test_it_says_what_it_needs_and_reports_its_settings(owner: type[Evaluator]) -> None:
    evaluator = owner()
    assert evaluator.headlines and evaluator.scored in evaluator.needs
    assert set(evaluator.roles) <= set(ROLES)
    assert evaluator.modality in (None, *modalities.names())
    assert set(evaluator.protocol) == {field.name for field in dataclasses.fields(owner)}
    json.dumps(evaluator.protocol)
    with pytest.raises(dataclasses.FrozenInstanceError):
        evaluator.features = Features(layer=0)


@pytest.mark.parametrize("owner", EVALUATORS, ids=name_of)
def test_a_missing_role_is_named(owner: type[Evaluator]) -> None:
    with pytest.raises(ValueError, match=rf"{owner.__name__}: needs the sources \['{owner.needs[0]}'.*given: \[\]"):
        owner().check({})


@pytest.mark.parametrize("owner", EVALUATORS, ids=name_of)
def test_settings_of_features_that_it_would_ignore_are_refused(owner: type[Evaluator]) -> None:
    others = {"size": 8, "layer": 0, "bf16": True, "tokens": "key", "crop": "inner"}
    for name, value in others.items():
        if name in owner.unused:
            with pytest.raises(ValueError, match=f"{owner.__name__}: features.{name}: {value}; this evaluator does not use it"):
                owner(features=Features(**{name: value}))
        else:
            assert owner(features=Features(**{name: value})).protocol["features"][name] == value


@pytest.mark.parametrize("owner", EVALUATORS, ids=name_of)
def test_a_configuration_builds_it_with_its_defaults_and_overrides_one_setting_of_features(owner: type[Evaluator]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--made", type=Evaluator)
    made = parser.instantiate(parser.parse_args(["--made", f"glpretrain.evaluate.{owner.__name__}"])).made
    assert type(made) is owner and json.dumps(made.protocol) == json.dumps(owner().protocol)
    made = parser.instantiate(
        parser.parse_args(["--made", f"glpretrain.evaluate.{owner.__name__}", "--made.init_args.features.batch_size", "7"])
    ).made
    assert made.features == dataclasses.replace(owner().features, batch_size=7)


@pytest.mark.parametrize("owner", EVALUATORS, ids=name_of)
def test_every_setting_is_explained(owner: type[Evaluator]) -> None:
    documented = " ".join(base.__doc__ or "" for base in owner.__mro__)
    assert not [field.name for field in dataclasses.fields(owner) if f"        {field.name}: " not in documented]


def test_another_kind_of_encoder_or_of_items_is_named() -> None:
    sources = {"test": labelled([0, 1] * 4, num_classes=2), "masked": masked([torch.ones(4, 4).long()] * 4)}
    for owner in EVALUATORS:
        if owner.modality == "points" and owner.needs == ("masked",):
            with pytest.raises(ValueError, match=f"encoder 'StubEncoder' is for image; {owner.__name__} accepts: points"):
                owner().run(StubEncoder(truth), sources)


def test_one_decoding_serves_all_evaluators() -> None:
    source = labelled([0, 1] * 8, num_classes=2)
    sources = Sources({"train": source, "test": source})
    decoded = sources["train"], sources["test"]
    glpretrain.evaluate.KNN(k=(1,)).run(StubEncoder(truth), sources)
    glpretrain.evaluate.LinearProbe(inverse_l2=(1.0,)).run(StubEncoder(truth), sources)
    assert source.num_reads == 2 * 16
    assert sources["train"] is decoded[0] and Sources.of(sources) is sources
    assert Sources({"train": decoded[0]})["train"] is decoded[0]


def test_later_sources_come_first_where_two_have_a_role() -> None:
    first, second = Sources({"train": Scenes(3), "test": Scenes(4)}), Sources({"test": Scenes(5)})
    joined = first | second
    assert {role: len(joined[role]) for role in joined} == {"train": 3, "test": 5}


@pytest.mark.parametrize("name", modalities.names())
def test_every_path_of_a_modality_leads_to_what_it_says(name: str) -> None:
    modality = modalities.get(name)
    for path in (modality.embedded_source, modality.masked_source, *modality.own_sources):
        source = imported(path)
        assert inspect.isclass(source) and issubclass(source, Source), path
    for path in modality.default_evaluators.values():
        evaluator = imported(path)
        assert issubclass(evaluator, Evaluator) and evaluator.modality in (None, name), path
    parameters = inspect.signature(imported(modality.page)).parameters
    assert list(parameters) == ["encoders", "files", "out", "size", "threshold", "layers"]
    assert list(default_evaluators(name)) == list(modality.default_evaluators)
    assert all(set(evaluator.needs) <= {"train", "test", "masked"} for evaluator in default_evaluators(name).values())
