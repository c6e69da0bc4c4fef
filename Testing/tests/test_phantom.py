"""Phantoms: repeatable, complete, in consistent geometry, and with the contrasts of a thigh in T1-weighted MR."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.phantom import STRUCTURES, make_case
from PresenceSegLib.domain.structure import StructureSet

LABEL = {s.name: n for n, s in enumerate(STRUCTURES, start=1)}
seeds = st.integers(0, 10_000)
few = settings(max_examples=5, deadline=None)


@pytest.fixture(scope="module")
def cases():
    return [make_case(seed) for seed in range(8)]


def in_limb_axes(case):
    """Image and labels [k, j, i] with i to the left (medial), j to the back, k to the head."""
    order = case.grid.axis_order()
    return order.apply(case.array), order.apply(case.labels)


def median(case, name):
    return float(np.median(case.array[case.labels == LABEL[name]]))


def touches(labels, a, b):
    return any(
        bool(((np.minimum(p, q) == min(a, b)) & (np.maximum(p, q) == max(a, b))).any())
        for p, q in ((labels[:, 1:], labels[:, :-1]), (labels[:, :, 1:], labels[:, :, :-1]))
    )


def test_structures_form_a_structure_set_with_complete_terminology():
    assert set(StructureSet(STRUCTURES).names) == {
        "cortical bone",
        "bone marrow",
        "subcutaneous fat",
        "quadriceps",
        "hamstrings",
        "adductors",
    }
    for structure in STRUCTURES:
        # context, category, type, modifier, region context, region, region modifier
        parts = structure.terminology.split("~")
        assert len(parts) == 7
        assert all(len(parts[n].split("^")) == 3 for n in (1, 2, 3, 5, 6))
        assert all(part.split("^")[1].isdigit() for part in parts[1:3])
        assert structure.has_side
        assert all(0 <= c <= 1 for c in structure.color)
    assert len({s.terminology for s in STRUCTURES}) == len({s.color for s in STRUCTURES}) == len(STRUCTURES)


@few
@given(seeds)
def test_the_same_seed_gives_the_same_case(seed):
    first, second = make_case(seed), make_case(seed)
    np.testing.assert_array_equal(first.array, second.array)
    np.testing.assert_array_equal(first.labels, second.labels)
    assert first.grid == second.grid


def test_other_seeds_give_other_people_scanners_and_positions(cases):
    assert len({c.grid for c in cases}) == len(cases)
    assert len({tuple(np.bincount(c.labels.ravel())) for c in cases}) == len(cases)
    fat = [median(c, "subcutaneous fat") for c in cases]
    assert max(fat) / min(fat) > 3
    assert len({np.linalg.det(np.reshape(c.direction, (3, 3))) > 0 for c in cases}) == 2


@few
@given(seeds)
def test_every_structure_is_there_in_a_valid_volume(seed):
    case = make_case(seed)
    assert case.array.dtype == np.float32 and case.labels.dtype == np.uint8
    assert case.array.shape == case.labels.shape
    assert np.isfinite(case.array).all() and case.array.min() >= 0
    counts = np.bincount(case.labels.ravel(), minlength=7)
    assert len(counts) == 7 and counts[1:].min() > 100
    slices, rows, columns = case.array.shape
    assert 14 <= slices <= 20 and 65 <= rows <= 80 and 65 <= columns <= 80
    assert case.spacing[0] == case.spacing[1]
    assert 2.3 < case.spacing[0] < 2.8 and 7 <= case.spacing[2] <= 10
    direction = np.reshape(case.direction, (3, 3))
    np.testing.assert_allclose(direction.T @ direction, np.eye(3), atol=1e-12)
    assert np.degrees(np.arccos(abs(direction[2, 2]))) < 20.001  # slices across the leg, tilted up to 20


@few
@given(seeds)
def test_a_right_thigh_in_patient_space_however_the_voxels_are_stored(seed):
    case = make_case(seed)
    k, j, i = np.nonzero(case.labels)
    position = np.stack([i, j, k, np.ones_like(i)])
    lps = (case.grid.ijk_to_lps @ position)[:3]
    center = {name: lps[:, case.labels[k, j, i] == label].mean(axis=1) for name, label in LABEL.items()}
    assert center["quadriceps"][1] < center["hamstrings"][1] - 10  # posterior is +y
    assert center["adductors"][0] > center["quadriceps"][0] + 10  # medial of a right thigh is +x
    assert np.linalg.norm(center["bone marrow"] - center["cortical bone"]) < 5
    assert lps[0].mean() < 0


def test_contrast_is_that_of_t1(cases):
    for case in cases:
        muscles = [median(case, name) for name in ("quadriceps", "hamstrings", "adductors")]
        air = float(np.median(case.array[:, :2, :2]))
        assert median(case, "subcutaneous fat") > 1.7 * max(muscles)
        assert median(case, "bone marrow") > 1.5 * max(muscles)
        assert min(muscles) > 2 * median(case, "cortical bone")
        assert median(case, "cortical bone") > air
        assert max(muscles) < 1.3 * min(muscles)  # the groups differ by their shape, not by their signal


def test_labels_follow_the_image(cases):
    # Between the typical fat and the typical muscle lies a threshold that tells most of their voxels apart.
    for case in cases:
        threshold = (median(case, "subcutaneous fat") + median(case, "quadriceps")) / 2
        assert (case.array[case.labels == LABEL["subcutaneous fat"]] > threshold).mean() > 0.85
        for name in ("quadriceps", "hamstrings", "adductors"):
            assert (case.array[case.labels == LABEL[name]] < threshold).mean() > 0.9


def test_neighbors_touch(cases):
    pairs = [
        ("quadriceps", "hamstrings"),
        ("quadriceps", "adductors"),
        ("hamstrings", "adductors"),
        ("cortical bone", "bone marrow"),
        ("cortical bone", "quadriceps"),
        ("subcutaneous fat", "quadriceps"),
    ]
    for case in cases:
        for a, b in pairs:
            assert touches(case.labels, LABEL[a], LABEL[b]), (a, b)


def test_tissue_of_no_structure_lies_within_the_limb(cases):
    for case in cases:
        image, labels = in_limb_axes(case)
        middle = len(labels) // 2
        labels, image = labels[middle], image[middle]
        labeled = labels > 0
        between = np.logical_and.reduce(
            [
                np.maximum.accumulate(labeled, 0),
                np.maximum.accumulate(labeled[::-1], 0)[::-1],
                np.maximum.accumulate(labeled, 1),
                np.maximum.accumulate(labeled[:, ::-1], 1)[:, ::-1],
            ]
        )
        distractors = image[between & ~labeled]
        fat = median(case, "subcutaneous fat")
        assert len(distractors) > 40
        assert distractors.min() < 0.3 * fat  # vessels
        assert ((distractors > 0.25 * fat) & (distractors < 0.5 * fat)).sum() > 10  # nerve, sartorius
        assert (distractors > 0.5 * fat).sum() > 10  # intermuscular fat


@pytest.mark.parametrize("name", [s.name for s in STRUCTURES])
def test_a_missing_structure_has_no_voxels(name):
    labels = make_case(5, missing={name}).labels
    absent = {LABEL[s.name] for s in STRUCTURES} - set(np.unique(labels))
    gone_too = {LABEL["bone marrow"]} if name == "cortical bone" else set()
    assert absent == {LABEL[name]} | gone_too


def test_missing_adductors_are_fat_in_the_image():
    whole, resected = make_case(5), make_case(5, missing=frozenset({"adductors"}))
    where = whole.labels == LABEL["adductors"]
    assert np.median(resected.array[where]) > 0.75 * median(whole, "subcutaneous fat")
    changed = (resected.labels != whole.labels) & ~where
    assert changed.mean() < 0.005 and not resected.labels[changed].any()  # voxels that adductors and others shared
    assert resected.grid == whole.grid


def test_large_is_the_same_person_twice_as_fine():
    small, large = make_case(2), make_case(2, size="large")
    assert large.array.shape == tuple(2 * n for n in small.array.shape)
    np.testing.assert_allclose(np.array(large.spacing) * 2, small.spacing)
    volumes = [np.bincount(c.labels.ravel(), minlength=7)[1:] * np.prod(c.spacing) for c in (small, large)]
    np.testing.assert_allclose(volumes[0], volumes[1], rtol=0.08)


def test_unknown_size_and_structure_are_refused():
    with pytest.raises(InputError, match="huge"):
        make_case(0, size="huge")
    with pytest.raises(InputError, match="spleen"):
        make_case(0, missing={"spleen"})
