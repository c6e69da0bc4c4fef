"""Settings, and what the cases decide: who validates, which spacing, patch, intensities and network."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import AXIS_ORDERS, CPU, TINY, add_case, grid, make_project, model_card

from PresenceSegLib.domain.case import CaseInfo
from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.model import PLANES
from PresenceSegLib.domain.segmentation import Segmentation, Status
from PresenceSegLib.domain.structure import StructureSet
from PresenceSegLib.domain.volume import Volume
from PresenceSegLib.engine.networks import NETWORKS, stride
from PresenceSegTrainingLib.domain.settings import TrainingSettings
from PresenceSegTrainingLib.engine.planning import batch_size, plan, split_cases

ABC = StructureSet.from_names(["a", "b", "c"])
GPU = type("Gpu", (), {"type": "cuda"})()


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_come_back_as_they_were_stored_and_unknown_ones_are_left_out():
    given_settings = TrainingSettings(presence_mask="plus", spacing=(1.5, 0.0, 2.0), patch=(8, 16, 24), parent="ä")
    stored = given_settings.to_json() | {"spacing": [1.5, 0.0, 2.0], "patch": [8, 16, 24], "from the future": 3}
    assert TrainingSettings.from_json(stored) == given_settings
    assert TrainingSettings.from_json({}) == TrainingSettings()


@pytest.mark.parametrize(
    "wrong",
    [
        {"iterations": 0},
        {"iterations": -1},
        {"minutes": -0.5},
        {"batch": -2},
        {"learning_rate": 0.0},
        {"learning_rate": -1e-3},
        {"learning_rate": math.nan},
        {"minutes": math.nan},
        {"validation_fraction": 1.0},
        {"validation_fraction": -0.1},
        {"foreground_fraction": 1.5},
        {"ema_decay": 1.0},
        {"weight_decay": -1.0},
        {"gradient_clip": 0.0},
        {"seed": -1},
        {"intensity": "pet"},
        {"spacing": (1.0, -1.0, 0.0)},
        {"spacing": (1.0, 1.0, math.nan)},
        {"patch": (-8, 0, 0)},
    ],
)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(InputError) as refusal:
        TrainingSettings(**wrong)
    message = str(refusal.value)
    assert any(word in message for word in (*wrong, "end", str(next(iter(wrong.values())))))


# --- who validates ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    """A case as far as the split looks at it."""

    name: str
    info: CaseInfo
    present: tuple[bool, ...]

    def presence(self, structures):
        assert len(structures) == len(self.present)
        return np.array(self.present)


def listed(number, present, subject=None, split=""):
    return Listed(f"case {number}", CaseInfo("", subject or f"subject {number}", split), tuple(map(bool, present)))


@st.composite
def case_lists(draw):
    count = draw(st.integers(1, 14))
    return [
        listed(
            n,
            draw(st.tuples(*[st.booleans()] * 3)),
            f"subject {draw(st.integers(0, 9))}",
            draw(st.sampled_from(["", "", "", "train", "validation", "test"])),
        )
        for n in range(count)
    ]


@settings(max_examples=300, deadline=None)
@given(cases=case_lists(), seed=st.integers(0, 50), fraction=st.sampled_from([0.0, 0.2, 0.5]))
def test_the_split_never_shares_a_subject_and_never_uses_test_cases_or_cases_that_teach_nothing(cases, seed, fraction):
    choice = TrainingSettings(seed=seed, validation_fraction=fraction)
    subjects_of = {
        split: {c.info.subject for c in cases if c.info.split == split} for split in ("train", "validation", "test")
    }
    if subjects_of["train"] & subjects_of["validation"]:
        with pytest.raises(InputError, match="marked for training and for validation"):
            split_cases(cases, ABC, choice)
        return
    usable = [c for c in cases if c.info.subject not in subjects_of["test"] and any(c.present)]
    marked = {c.info.subject for c in usable} & subjects_of["validation"]
    if all(c.info.subject in marked for c in usable):
        with pytest.raises(InputError, match="No case has an annotated structure"):
            split_cases(cases, ABC, choice)
        return
    train, validation = split_cases(cases, ABC, choice)
    assert sorted(c.name for c in train + validation) == sorted(c.name for c in usable)
    subjects = {c.info.subject for c in validation}
    assert not subjects & {c.info.subject for c in train}
    assert split_cases(cases, ABC, choice) == (train, validation)
    if marked:
        assert subjects == marked
        return
    assert not any(c.info.split == "train" for c in validation), "a case marked for training validates"
    for n in range(3):
        if any(c.present[n] for c in usable):
            assert any(c.present[n] for c in train), "a structure lost its last training case"
    if fraction == 0:
        assert not validation
    free = {c.info.subject for c in usable} - {c.info.subject for c in cases if c.info.split}
    assert len(subjects) <= (max(1, round(fraction * len(free))) if len(free) >= 4 else 0)


def test_a_fifth_of_the_subjects_validates_and_the_seed_says_which():
    cases = [listed(n, (1, 1, 1), f"subject {n // 2}") for n in range(20)]
    chosen = set()
    for seed in range(6):
        train, validation = split_cases(cases, ABC, TrainingSettings(seed=seed))
        assert (len(train), len(validation)) == (16, 4)
        chosen.add(tuple(c.name for c in validation))
    assert len(chosen) > 1


def test_from_four_subjects_on_one_validates_and_from_three_none():
    for count, expected in ((3, 0), (4, 1)):
        cases = [listed(n, (1, 0, 1)) for n in range(count)]
        assert len(split_cases(cases, ABC, TrainingSettings())[1]) == expected


def test_another_scan_of_a_test_subject_does_not_train():
    cases = [listed(0, (1, 1, 1), "A", "test"), listed(1, (1, 1, 1), "A"), listed(2, (1, 1, 1), "B")]
    train, validation = split_cases(cases, ABC, TrainingSettings())
    assert [c.info.subject for c in train + validation] == ["B"]


def test_the_drawn_subjects_score_as_many_structures_as_they_can():
    presence = [(1, 0, 0)] * 5 + [(0, 1, 0)] * 5 + [(0, 0, 1)] * 5
    for seed in range(5):
        _, validation = split_cases([listed(n, p) for n, p in enumerate(presence)], ABC, TrainingSettings(seed=seed))
        assert np.any([c.present for c in validation], axis=0).all()


def test_nothing_annotated_is_refused_with_what_to_do():
    with pytest.raises(InputError, match="only Completed segments train"):
        split_cases([listed(0, (0, 0, 0)), listed(1, (1, 1, 1), split="test")], ABC, TrainingSettings())


# --- what the data suggest -------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path / "p", ABC.names)


def test_spacing_is_the_median_along_body_axes_whatever_the_axis_order(project):
    for n, spacing in enumerate([(1.0, 1.5, 4.0), (1.1, 1.6, 5.0), (0.9, 1.4, 6.0)]):  # L, P, S
        direction = AXIS_ORDERS[n * 17]
        body_axis = np.abs(direction).argmax(axis=0)
        on = grid([(24, 24, 12)[a] for a in body_axis], [spacing[a] for a in body_axis], direction)
        add_case(project, f"c{n}", ["a"], on=on)
    spec, preprocessing = plan(project.cases(), ABC, TrainingSettings(), CPU, None)
    assert preprocessing.spacing == pytest.approx((5.0, 1.5, 1.0))
    assert preprocessing.intensity == {"kind": "mr"}
    assert spec.strides[0][0] == 1, "thick slices are not halved first"


@pytest.mark.parametrize("plane", ["", *PLANES])
@pytest.mark.parametrize("network", NETWORKS)
def test_patches_are_multiples_of_the_stride_within_what_the_device_takes(project, network, plane):
    add_case(project, "c", ["a"], on=grid((120, 90, 60), (1.0, 1.0, 1.0)))
    choice = TrainingSettings(network=network, plane=plane)
    spec, preprocessing = plan(project.cases(), ABC, choice, CPU, None)
    assert (spec.name, spec.plane) == (network, plane)
    assert all(n % s == 0 for n, s in zip(preprocessing.patch, stride(spec), strict=True))
    if plane:
        axis = PLANES.index(plane)
        assert preprocessing.patch[axis] == 1 and preprocessing.spacing[axis] is None
        assert batch_size(choice, spec, CPU) == batch_size(choice, spec, GPU) == 12
    else:
        assert np.prod(preprocessing.patch) <= 48 * 56 * 48 * 1.6  # rounding up to the stride
        larger = plan(project.cases(), ABC, choice, GPU, None)[1]
        assert np.prod(larger.patch) > np.prod(preprocessing.patch)


def test_what_the_settings_name_is_taken(project):
    add_case(project, "c", ["a"])
    choice = TrainingSettings(spacing=(0.0, 3.0, 0.0), patch=(0, 10, 16), intensity="mr", batch=7)
    spec, preprocessing = plan(project.cases(), ABC, choice, CPU, None)
    assert preprocessing.spacing == (2.0, 3.0, 1.0)
    assert preprocessing.patch[2] == 16 and preprocessing.patch[1] in range(10, 17)
    assert batch_size(choice, spec, CPU) == 7


@pytest.mark.parametrize("choice", [{"network": "vnet"}, {"plane": "oblique"}])
def test_unknown_networks_and_planes_are_refused(project, choice):
    add_case(project, "c", ["a"])
    with pytest.raises(InputError, match="vnet|oblique"):
        plan(project.cases(), ABC, TrainingSettings(**choice), CPU, None)


def test_a_parent_decides_network_and_preprocessing(project):
    add_case(project, "c", ["a"])
    parent = model_card(["a", "z"], TINY, (7.0, 7.0, 7.0), (4, 4, 4))
    choice = TrainingSettings(network="dynunet", patch=(32, 32, 32), spacing=(1.0, 1.0, 1.0))
    assert plan(project.cases(), ABC, choice, CPU, parent) == (parent.network, parent.preprocessing)


def add_ct(project, name, cropped=False, seed=0):
    """A case of Hounsfield units: air at -1000, structure "a" (Completed) in 0..99, "b" (In progress) at 500."""
    on = grid((16, 14, 12), (1, 1, 1))
    array = np.full(on.shape, -1000, np.int16)
    array[2:6, 2:12, 2:12] = np.random.default_rng(seed).integers(0, 100, (4, 10, 10))
    array[7:10, 2:12, 2:12] = 500
    low = (1, 1, 1) if cropped else (0, 0, 0)
    origin = tuple(o + s for o, s in zip(on.origin, low, strict=True))
    stored = replace(on, size=tuple(n - s for n, s in zip(on.size, low, strict=True)), origin=origin)
    segmentation = Segmentation.empty(stored)
    inside = tuple(slice(s, None) for s in low)
    segmentation.put(ABC[0], ((array >= 0) & (array < 100))[inside], Status.COMPLETED)
    segmentation.put(ABC[1], (array == 500)[inside], Status.IN_PROGRESS)
    return project.add_case(name, Volume(array, on), segmentation, CaseInfo("", name))


@pytest.mark.parametrize("cropped", [False, True])
def test_ct_is_recognized_and_scaled_by_its_annotated_voxels_alone(project, cropped):
    cases = [add_ct(project, f"c{n}", cropped, n) for n in range(2)]
    values = np.concatenate([c.read_volume().array[2:6, 2:12, 2:12].ravel() for c in cases]).astype(float)
    low, high = np.percentile(values, (0.5, 99.5))
    intensity = plan(cases, ABC, TrainingSettings(), CPU, None)[1].intensity
    assert intensity == pytest.approx(
        {
            "kind": "ct",
            "low": low,
            "high": high,
            "mean": values.clip(low, high).mean(),
            "std": values.clip(low, high).std(),
        }
    )


def test_one_volume_that_is_no_ct_makes_all_of_them_mr(project):
    cases = [add_ct(project, "c0"), add_case(project, "c1", ["a"])]
    for order in (cases, cases[::-1]):
        assert plan(order, ABC, TrainingSettings(), CPU, None)[1].intensity == {"kind": "mr"}
